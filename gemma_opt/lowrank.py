"""Low rank: a linear becomes two thin ones, y = left(right(x)), from a truncated singular value decomposition.

Plain, it keeps the weight as well as its rank allows. Whitened, it keeps the layer's output on the calibration data: with
second moments E[xᵀx] = L·Lᵀ the output's error is ‖(W − left·right)·L‖, and the best factors come from the decomposition
of W·L. Layers are measured in sequence, behind those that were factorized before them. The factors are linears of their
own, so distillation trains them and every format stores them as it stores any linear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma_opt.calibration import CalibrationData, Moments, walk_layers
from gemma_opt.errors import PlanError, WeightsError
from gemma_opt.gemma import GemmaModel
from gemma_opt.policy import Plan, PlanRow, Progress, factor_rows, kept_rank, planned_weights, quiet, saves
from gemma_opt.recipe import LowRank


class LowRankLinear(nn.Module):
    """y = left(right(x)). right: [rank, in] without bias; left: [out, rank] with the linear's bias, if it had one."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left = left
        self.right = right

    @property
    def out_features(self) -> int:
        """Length of y."""
        return int(getattr(self.left, "out_features"))  # noqa: B009 nn.Linear or a quantized one

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        return self.left(self.right(x))


@dataclass(frozen=True)
class Decomposition:
    """W·L = U·diag(singular)·Vᵀ of a weight W [out, in]. root: L [in, in], lower triangular; None for the identity."""

    u: Tensor
    singular: Tensor
    vt: Tensor
    root: Tensor | None

    def rank_of_energy(self, energy: float) -> int:
        """The smallest rank that keeps that share of Σ singular²."""
        kept = self.singular.double().square().cumsum(0)
        return int((kept < energy * kept[-1]).sum()) + 1

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """left [out, rank] and right [rank, in], the singular values shared evenly between them."""
        scale = self.singular[:rank].sqrt()
        left, right = self.u[:, :rank] * scale, self.vt[:rank] * scale[:, None]
        if self.root is not None:
            right = torch.linalg.solve_triangular(self.root, right, upper=False, left=False)
        return left, right


def decompose(weight: Tensor, root: Tensor | None = None) -> Decomposition:
    """The decomposition of a weight [out, in], in float32."""
    wanted = weight.float() if root is None else weight.float() @ root
    u, singular, vt = torch.linalg.svd(wanted, full_matrices=False)
    return Decomposition(u, singular, vt, root)


def whitening(hessian: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of second moments [in, in], with damping · their mean diagonal added. Raises WeightsError."""
    ridge = damping * hessian.diagonal().mean() + torch.finfo(hessian.dtype).tiny
    root, wrong = torch.linalg.cholesky_ex(hessian + ridge * torch.eye(len(hessian), device=hessian.device))
    if wrong:
        raise WeightsError("the second moments of a layer's inputs are not positive definite: raise `damping`")
    return root


@torch.no_grad()
def factorize_(
    model: GemmaModel,
    sections: tuple[LowRank, ...],
    plan: Plan,
    progress: Progress = quiet,
    data: CalibrationData | None = None,
) -> Plan:
    """Replace the planned linears in place. Returns the plan with the ranks there really are.

    plan: before low rank. data: for sections that whiten; what its store holds is not done again. Raises PlanError where the
    model is not the planned one, or naming every layer whose energy takes a rank that saves nothing.
    """
    of_role = {role: section for section in sections for role in section.roles}
    chosen = {row.name: (row, of_role[row.role]) for row in plan.rows if row.kind == "linear" and row.role in of_role}
    planned_weights(model, [row for row, _ in chosen.values()])
    run = _Run(model, chosen, progress)
    for name, (_, section) in chosen.items():
        if not section.whiten:
            run.replace_(name, None)
    if whitened := [name for name, (_, section) in chosen.items() if section.whiten]:
        if data is None:
            raise PlanError("lowrank: whitening needs calibration data, and the pipeline was given none")
        run.walk_(whitened, data)
    if run.problems:
        raise PlanError("lowrank: there is nothing to save:\n  " + "\n  ".join(run.problems))
    return Plan(
        tuple(new for row in plan.rows for new in (factor_rows(row, run.ranks[row.name]) if row.name in run.ranks else (row,)))
    )


class _Run:
    """One factorization under way. ranks: what was chosen; problems: one line for each layer that cannot save."""

    def __init__(self, model: GemmaModel, chosen: Mapping[str, tuple[PlanRow, LowRank]], progress: Progress) -> None:
        self._model = model
        self._chosen = chosen
        self._progress = progress
        self.ranks: dict[str, int] = {}
        self.problems: list[str] = []

    def walk_(self, names: list[str], data: CalibrationData) -> None:
        """Measure and replace layer by layer; each linear behind all that were replaced before it."""
        for block in walk_layers(self._model, data.samples):
            finished = data.store.load(f"lowrank.{block.name}") or {}
            new: dict[str, Tensor] = {}
            for step in block.steps(names):
                moments = {} if finished else block.moments(step)
                for name in step:
                    if f"{name}.left" in finished:
                        self._put_(name, finished[f"{name}.left"], finished[f"{name}.right"])
                    elif made := self.replace_(name, moments[name]):
                        new |= {f"{name}.left": made[0], f"{name}.right": made[1]}
            block.advance()
            if new and not self.problems:
                data.store.save(f"lowrank.{block.name}", new)

    def replace_(self, name: str, moments: Moments | None) -> tuple[Tensor, Tensor] | None:
        """Put factors in the place of a linear. Returns left and right; None where they would save nothing."""
        row, section = self._chosen[name]
        root = None
        if moments is not None:
            if moments.hessian is None:
                raise PlanError(f"{name}: second moments are needed and were not measured")
            root = whitening(moments.hessian, section.damping)
        found = decompose(_linear(self._model, name).weight.detach(), root)
        rank = kept_rank(section, row.shape)
        if section.energy is not None:
            least = found.rank_of_energy(section.energy)
            rank = -(-least // section.multiple) * section.multiple
            if not saves(rank, row.shape):
                self.problems.append(f"{name} {list(row.shape)}: an energy of {section.energy} takes rank {rank}")
                return None
        left, right = found.factors(rank)
        self._put_(name, left, right)
        return left, right

    def _put_(self, name: str, left: Tensor, right: Tensor) -> None:
        linear = _linear(self._model, name)
        made = _factors(linear, left.shape[1])
        for factor, value in ((made.left, left), (made.right, right)):
            factor.get_parameter("weight").copy_(value)
        if (bias := dict(linear.named_parameters()).get("bias")) is not None:
            made.left.get_parameter("bias").copy_(bias)
        self._model.set_submodule(name, made)
        self.ranks[name] = left.shape[1]
        self._progress(len(self.ranks), len(self._chosen), name)


def empty_like_plan_(model: nn.Module, plan: Plan) -> None:
    """Replace the planned linears by empty factors on the model's device (meta): what `factorize_` leaves, before it is filled.

    Raises PlanError where the model has no such linear.
    """
    for row in plan.rows:
        if match := re.fullmatch(r"(.+)\.left", row.name):
            model.set_submodule(match[1], _factors(_linear(model, match[1]), row.shape[1]))


def _factors(linear: nn.Linear, rank: int) -> LowRankLinear:
    """Factors without values, like a linear in device, dtype and bias."""
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    left = nn.Linear(rank, linear.out_features, bias="bias" in dict(linear.named_parameters()), **like)
    right = nn.Linear(linear.in_features, rank, bias=False, **like)
    return LowRankLinear(left, right)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        raise PlanError(f"{name}: is planned as low rank, and is no linear of this model")
    return module
