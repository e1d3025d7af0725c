"""Recovery training: AdamW on float32 copies of what is trained, products in the recipe's precision.

The decoder runs under autograd; the head and the loss do not: logits are made and differentiated slice by slice, so that
their memory is that of a slice and not of a batch. Every step is a pure function of the state before it and of the step's
number, so a training that was killed goes on from its last saved state to the same weights, to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from gemma_opt.calibration import Sample, Store
from gemma_opt.distill.batches import Batch, collate, windows_of_step
from gemma_opt.distill.losses import hidden_loss
from gemma_opt.distill.rounding import Rounding, rounded
from gemma_opt.distill.teacher import POSITIONS, Seen, Teacher, decoder, head_table, image_token
from gemma_opt.errors import PlanError, WeightsError
from gemma_opt.gemma import GemmaModel, weights_device
from gemma_opt.policy import Role, main_parameter, role_of
from gemma_opt.recipe import Distill

WARM_UP = 0.1  # of a phase's steps: Adam's first updates move every weight by the whole rate
LOWEST_RATE = 0.1  # of the peak, at the end of the cosine
MAX_GRADIENT_NORM = 1.0
BETAS = (0.9, 0.98)  # a few hundred steps are too short for the usual memory of 1,000
SAVE_EVERY_S = 120.0

Progress = Callable[[int, int, float], None]  # steps done, steps in all, the last step's loss


@dataclass(frozen=True)
class Phase:
    """A stretch of training with a learning rate schedule of its own: steps first..first + steps of the data's order."""

    number: int
    first: int
    steps: int


@dataclass(frozen=True)
class Student:
    """What is trained. masked: names of the modules whose zeros stay zero; roundings: of linears trained behind them."""

    model: GemmaModel
    masked: frozenset[str] = frozenset()
    roundings: Mapping[str, Rounding] = field(default_factory=dict[str, Rounding])


def phases(section: Distill, count: int) -> list[Phase]:
    """The section's steps in equal shares for `count` phases; the last takes what does not divide."""
    share = section.steps // count
    return [
        Phase(number, number * share, share if number < count - 1 else section.steps - number * share)
        for number in range(count)
    ]


def learning_rate(done: int, steps: int, peak: float) -> float:
    """Of the step after `done` of `steps`: a linear warm-up, then a cosine down to a tenth of the peak."""
    warm = max(1, round(steps * WARM_UP))
    if done < warm:
        return peak * (done + 1) / warm
    part = (done - warm) / max(1, steps - warm)
    return peak * (LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * part)) / 2)


def accelerator_of(section: Distill, device: torch.device) -> Accelerator:
    """accelerate's context for precision and device. It keeps one per process, which the last recipe's precision would bind."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16" if section.precision == "bfloat16" else "no", cpu=device.type == "cpu")


def trained_parameters(model: GemmaModel, section: Distill) -> dict[str, nn.Parameter]:
    """Parameters of the trained roles by name; of the norms only the text decoder's."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if main_parameter(module) is None or (role := role_of(name)) not in section.roles:
            continue
        if role is Role.NORM and ("vision_tower" in name or "multi_modal_projector" in name):
            continue
        found |= {f"{name}.{leaf}": parameter for leaf, parameter in module.named_parameters(recurse=False)}
    return found


def distill_(
    student: Student,
    teacher: Teacher,
    section: Distill,
    phase: Phase,
    samples: Sequence[Sample],
    store: Store,
    progress: Progress,
    save_every_s: float = SAVE_EVERY_S,
) -> list[float]:
    """Train the student in place through one phase. Returns the loss of every step, in nats a counted position.

    Weights of masked modules that are zero stay exactly zero. What the store holds of this phase is not done again.
    Raises PlanError where the model has nothing of the trained roles, WeightsError where the training diverges.
    """
    model = student.model
    parameters = trained_parameters(model, section)
    if not parameters:
        raise PlanError(f"distill: the model has no layer of the roles {', '.join(section.roles)}")
    if finished := store.load("trained"):
        _put_(parameters, finished)
        return finished[_LOSSES].tolist()
    zero = {name: weight.detach() == 0 for name, weight in parameters.items() if name.removesuffix(".weight") in student.masked}
    with _training(model, parameters), rounded(model, student.roundings) as changed:
        losses = _Run(model, teacher, section, samples, parameters, zero, changed).train(phase, store, progress, save_every_s)
    revived = [name for name, mask in zero.items() if parameters[name].detach()[mask].count_nonzero()]
    if revived:
        raise PlanError("distill: pruned weights came back in:\n  " + "\n  ".join(revived))
    store.save("trained", _tensors(parameters) | {_LOSSES: torch.tensor(losses, dtype=torch.float64)})
    store.remove("state")
    return losses


_LOSSES = ".losses"  # no parameter's name begins with a dot
_ADAM = ("step", "exp_avg", "exp_avg_sq")


@contextmanager
def _training(model: GemmaModel, parameters: Mapping[str, nn.Parameter]) -> Generator[None]:
    """The trained parameters in float32 with gradients, everything else frozen; afterwards all is as it was, but trained."""
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
        with torch.enable_grad():
            yield
    finally:
        model.requires_grad_(False)
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(dtypes[name])
            parameter.grad = None
        for parameter in wanted:
            parameter.requires_grad_()


class _Run:
    """One phase under way."""

    def __init__(
        self,
        model: GemmaModel,
        teacher: Teacher,
        section: Distill,
        samples: Sequence[Sample],
        parameters: Mapping[str, nn.Parameter],
        zero: Mapping[str, Tensor],
        weights_changed: Callable[[], None],
    ) -> None:
        self._model = model
        self._teacher = teacher
        self._section = section
        self._samples = samples
        self._parameters = parameters
        self._zero = zero
        self._weights_changed = weights_changed
        self._embedding = cast(Tensor, model.get_input_embeddings().weight)
        self._table = head_table(model, section)
        self._accelerator = accelerator_of(section, weights_device(model))
        self._adam = torch.optim.AdamW(
            parameters.values(), lr=section.learning_rate, betas=BETAS, weight_decay=section.weight_decay, fused=True
        )
        self._optimizer = self._accelerator.prepare_optimizer(self._adam)

    def train(self, phase: Phase, store: Store, progress: Progress, save_every_s: float) -> list[float]:
        losses = self._resume(store)
        saved = time.monotonic()
        for done in range(len(losses), phase.steps):
            for group in self._adam.param_groups:
                group["lr"] = learning_rate(done, phase.steps, self._section.learning_rate)
            losses.append(self._step(phase.first + done))
            if not math.isfinite(losses[-1]):
                raise WeightsError(f"distill: the loss of step {done} is {losses[-1]}: set a lower learning_rate")
            if time.monotonic() - saved >= save_every_s:
                self._save(store, losses)
                saved = time.monotonic()
            progress(done + 1, phase.steps, losses[-1])
        return losses

    def _step(self, step: int) -> float:
        section = self._section
        windows = windows_of_step(step, section.batch, len(self._samples), section.seed)
        parts = [windows[at : at + section.micro_batch] for at in range(0, len(windows), section.micro_batch)]
        batches = [collate(self._samples, part, image_token(self._model), self._embedding) for part in parts]
        positions = sum(int(batch.counted.sum()) for batch in batches)
        loss = sum(self._backward(batch, positions) for batch in batches)
        for name, mask in self._zero.items():
            if (gradient := self._parameters[name].grad) is not None:
                gradient.masked_fill_(mask, 0)
        self._accelerator.clip_grad_norm_(list(self._parameters.values()), MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._weights_changed()
        return loss

    def _backward(self, batch: Batch, positions: int) -> float:
        """Add the gradient of one micro-batch. Returns its part of the step's loss; `positions`: counted in the whole step."""
        weight = self._section.hidden * float(batch.counted.sum()) / positions
        with self._accelerator.autocast():
            seen = self._teacher.look(batch)
            output = decoder(self._model)(**batch.inputs, use_cache=False, output_hidden_states=weight > 0)
        states = output.last_hidden_state[batch.counted]
        loss, gradient = self._head(states.detach(), seen, positions)
        if seen.hidden is None:
            torch.autograd.backward(states, gradient)
            return loss
        term = hidden_loss(output.hidden_states, seen.hidden, batch.counted) * weight
        torch.autograd.backward((states, term), (gradient, torch.ones_like(term)))
        return loss + term.item()

    @torch.no_grad()
    def _head(self, states: Tensor, seen: Seen, positions: int) -> tuple[float, Tensor]:
        """Loss over states [counted, width] and its gradient there; the head's own is added to it, where it is trained."""
        if self._embedding.requires_grad:
            self._table = head_table(self._model, self._section)
        table = self._table if seen.rows is None else self._table[seen.rows]
        gradient, loss = torch.empty_like(states), 0.0
        for at in range(0, len(states), POSITIONS):
            piece = slice(at, at + POSITIONS)
            given = states[piece].to(table.dtype)
            found = seen.loss(nn.functional.linear(given, table), piece)
            loss += float(found.value) / positions
            slope = (found.gradient / positions).to(table.dtype)
            gradient[piece] = (slope @ table).to(gradient.dtype)
            if self._embedding.requires_grad:
                self._add_head_gradient((slope.T @ given).float(), seen.rows)
        return loss, gradient

    def _add_head_gradient(self, gradient: Tensor, rows: Tensor | None) -> None:
        if self._embedding.grad is None:
            self._embedding.grad = torch.zeros_like(self._embedding)
        if rows is None:
            self._embedding.grad += gradient
        else:
            self._embedding.grad.index_add_(0, rows, gradient)

    # Going on after a kill

    def _save(self, store: Store, losses: list[float]) -> None:
        state = {
            f"{name}.{entry}": cast(Tensor, self._adam.state[parameter][entry])
            for name, parameter in self._parameters.items()
            if parameter in self._adam.state  # one that no batch has reached yet has no state
            for entry in _ADAM
        }
        store.save("state", _tensors(self._parameters) | state | {_LOSSES: torch.tensor(losses, dtype=torch.float64)})

    def _resume(self, store: Store) -> list[float]:
        """Take up the saved state of this phase, if there is one. Returns the losses up to there."""
        saved = store.load("state")
        if saved is None:
            return []
        _put_(self._parameters, saved)
        for name, parameter in self._parameters.items():
            if f"{name}.{_ADAM[0]}" in saved:
                self._adam.state[parameter] = {entry: saved[f"{name}.{entry}"].to(parameter.device) for entry in _ADAM}
        return saved[_LOSSES].tolist()


def _tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _put_(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data = saved[name].to(parameter.device, parameter.dtype)
