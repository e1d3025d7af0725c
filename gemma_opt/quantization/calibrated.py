"""The formats that measure what linears receive, one decoder layer at a time: static scales, smoothing, fitted int4, GPTQ.

Every linear is measured behind all that was quantized before it, inside its own layer too. A finished layer is kept in the
store, and a build that was interrupted goes on from there. Scales are part of the checkpoint: the data is never needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, singledispatch
from typing import cast

import torch
from torch import Tensor, nn

from gemma_opt.calibration import Block, CalibrationData, Moments, walk_layers
from gemma_opt.errors import PlanError
from gemma_opt.gemma import GemmaModel, text_layers
from gemma_opt.policy import Plan, PlanRow, Progress
from gemma_opt.quantization import fit, grid
from gemma_opt.quantization.gptq import DAMPING, Curvature, curvature, gptq
from gemma_opt.quantization.handlers import (
    Tensors,
    bias_of,
    empty_linear,
    int4_tensors,
    linear_at,
    linear_of,
    round_weight_,
    weigh,
    weigh_int4,
)
from gemma_opt.quantization.observers import Observed
from gemma_opt.quantization.rows import fitted_fp8_rows
from gemma_opt.quantization.smoothing import smooth_
from gemma_opt.recipe import FLOATS, Fp8Dynamic, Fp8Static, Int4, Int8DynamicInt4, Int8Static, Smoothed


class Step:
    """Linears of one layer that read the same input, measured as far as their formats ask."""

    def __init__(self, block: Block, names: Sequence[str]) -> None:
        self.block, self.names = block, names

    @cached_property
    def curvature(self) -> Curvature:
        """Of the squared error of the output in the weights."""
        moments: Moments = self.block.moments(self.names)[self.names[0]]
        if moments.hessian is None:
            raise PlanError("a full Hessian is needed and was not measured")
        return curvature(moments.hessian)

    @cached_property
    def importance(self) -> Tensor:
        """[in]: the Hessian's diagonal, damped as it is, without the rest."""
        name = self.names[0]
        squares, tokens = torch.zeros(()), 0
        for inputs in self.block.inputs([name]):
            x, counts = inputs[name]
            square = x.float().square()
            squares = squares.to(x.device) + (square if counts is None else square * counts).sum(dim=0)
            tokens += len(x)
        mean = squares / tokens
        return mean + (DAMPING * mean.mean()).clamp(min=torch.finfo(mean.dtype).tiny)

    @cached_property
    def observed(self) -> Observed:
        """How far the input reaches."""
        return observe(self.block, self.names[:1])[self.names[0]]


def observe(block: Block, names: Sequence[str]) -> dict[str, Observed]:
    """Statistics of the inputs of these linears."""
    found = {name: Observed() for name in names}
    for inputs in block.inputs(names):
        for name, (x, counts) in inputs.items():
            found[name].add(x, counts)
    return found


@singledispatch
def weigh_measured(stored: object, weight: Tensor, step: Step) -> Tensors:
    """The stored tensors of a float weight [out, in], by what its input measures. Formats that ask for nothing are weighed."""
    return weigh(stored, weight)


@weigh_measured.register(Int8Static)
def _(stored: Int8Static, weight: Tensor, step: Step) -> Tensors:
    return {**weigh(stored, weight), "input_scale": _input_scale(stored, weight, step)}


@weigh_measured.register(Fp8Dynamic)
def _(stored: Fp8Dynamic, weight: Tensor, step: Step) -> Tensors:
    if not stored.measures:
        return weigh(stored, weight)
    rows, scale = fitted_fp8_rows(weight, step.importance)
    return {"weight": rows, "weight_scale": scale}


@weigh_measured.register(Fp8Static)
def _(stored: Fp8Static, weight: Tensor, step: Step) -> Tensors:
    rows, scale = fitted_fp8_rows(weight, step.importance)
    return {"weight": rows, "weight_scale": scale, "input_scale": _input_scale(stored, weight, step)}


@weigh_measured.register(Int4 | Int8DynamicInt4)
def _(stored: Int4 | Int8DynamicInt4, weight: Tensor, step: Step) -> Tensors:
    if stored.method == "rtn":
        return weigh(stored, weight)
    if _is_on_grid(weight, stored.group):
        return weigh(stored, weight)
    if stored.method == "hqq":
        return weigh_int4(stored, weight, step.importance)
    groups = grid.grouped(weight, stored.group)
    importance = step.curvature.hessian.diagonal().unflatten(0, groups.shape[1:])
    fitted = fit.fitted_grid(groups, symmetric=stored.symmetric, importance=importance)
    return int4_tensors(stored, *gptq(weight.float(), step.curvature, fitted))


def _input_scale(stored: Int8Static | Fp8Static, weight: Tensor, step: Step) -> Tensor:
    return step.observed.scale(stored.observer, stored.activation).to(weight.device)


def in_decoder(model: nn.Module, plan: Plan) -> tuple[PlanRow, ...]:
    """The quantized linears of the decoder layers."""
    layers = tuple(f"{name}." for name in text_layers(model))
    return tuple(row for row in plan.quantized() if row.name.startswith(layers))


def quantize_layers_(model: nn.Module, plan: Plan, data: CalibrationData, progress: Progress) -> None:
    """Quantize the linears of all decoder layers, in the order in which they run. progress: called after every layer."""
    done, rows = 0, in_decoder(model, plan)
    for block in walk_layers(cast(GemmaModel, model), data.samples):
        linears = [row for row in plan.rows if row.kind == "linear" and row.name.startswith(f"{block.name}.")]
        own = {row.name: row for row in linears if row.is_quantized}
        if finished := data.store.load(block.name):
            _restore_(model, block.layer, own, finished)
        else:
            _smooth_(model, block, linears)
            for names in block.steps(list(own)):
                _quantize_step_(model, Step(block, names), own)
            for row in linears:
                if isinstance(row.format, FLOATS):
                    round_weight_(model, row)  # smoothing may have moved it
            data.store.save(block.name, block.layer.state_dict())
        block.advance()
        done += len(own)
        progress(done, len(rows), block.name)


def _quantize_step_(model: nn.Module, step: Step, rows: dict[str, PlanRow]) -> None:
    linears = {name: linear_at(model, rows[name]) for name in step.names}
    tensors = {name: weigh_measured(rows[name].format, linear.weight.detach(), step) for name, linear in linears.items()}
    for name, linear in linears.items():
        model.set_submodule(name, linear_of(rows[name].format, tensors[name], bias_of(linear)))


def _restore_(model: nn.Module, layer: nn.Module, rows: dict[str, PlanRow], tensors: dict[str, Tensor]) -> None:
    device = next(layer.parameters()).device
    for row in rows.values():
        model.set_submodule(row.name, empty_linear(row.format, linear_at(model, row)))
    layer.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, strict=True, assign=True)


def _smooth_(model: nn.Module, block: Block, linears: list[PlanRow]) -> None:
    """Smooth the inputs that any reader's format asks to. Last ones first: each changes weights before it.

    A layer that holds a quantization-aware linear is left alone: factors would move it off its grid.
    """
    rows = {row.name: row for row in linears}
    int4 = [(row, row.format.group) for row in linears if isinstance(row.format, Int4 | Int8DynamicInt4)]
    if any(_is_on_grid(linear_at(model, row).weight, group) for row, group in int4):
        return
    wanted = {
        tuple(names): max(alphas)
        for names in block.steps(list(rows))
        if not names[0].endswith(".left")  # low rank: nothing before it could be divided but its own right
        and (alphas := [alpha for name in names if (alpha := _alpha(rows[name])) is not None])
    }
    peaks = {name: seen.channels for name, seen in observe(block, [names[0] for names in wanted]).items()} if wanted else {}
    for names, alpha in reversed(wanted.items()):
        found = peaks[names[0]]
        if found is not None:
            smooth_(block.layer, {name: linear_at(model, rows[name]) for name in names}, found, alpha)


def _is_on_grid(weight: Tensor, group: int) -> bool:
    groups = grid.grouped(weight.detach(), group)
    return all(bool(grid.exact_grid(some)[1].all()) for some in (groups[:16], groups))  # a few rows settle it for most


def _alpha(row: PlanRow) -> float | None:
    return row.format.smooth if isinstance(row.format, Smoothed) else None
