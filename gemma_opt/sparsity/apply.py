"""Walk a model and zero what a sparsity stage asks for: in place, one layer at a time, reconciled with the plan.

Zeroed weights stay in dense tensors, so the methods here make nothing smaller or faster; `calibrated` holds those that
measure the model on data. A zero scores lowest, so a second
stage drops the zeros of the first one first and counts them. Biases are never touched: a zeroed output row of a vision
linear still gives its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch

from torch import Tensor, nn

from gemma_opt.calibration import CalibrationData
from gemma_opt.errors import PlanError
from gemma_opt.policy import Plan, Progress, dropped_count, planned_weights, pool_size, quiet
from gemma_opt.recipe import Gradual, LayerNorm, Magnitude, Rows, SparsityStage
from gemma_opt.sparsity import masks, scores
from gemma_opt.sparsity.allocation import layer_norm_counts
from gemma_opt.sparsity.schedule import ratio_after

Weights = Mapping[str, nn.Parameter]
BetweenSteps = Callable[[int], object]


@dataclass(frozen=True)
class LayerSparsity:
    """What a stage asked of a layer and what is there now.

    asked: ratio; dropped: weights under the stage's mask, or removed; zeros: weights that are removed or zero afterwards,
    those of earlier stages and natural ones included; weights: all of the layer before the stage.
    """

    asked: float
    dropped: int
    zeros: int
    weights: int

    @property
    def measured(self) -> float:
        return self.zeros / self.weights


@dataclass(frozen=True)
class _Run:
    """What a handler needs beside its stage: the planned weights by module name, whom to tell, and what to measure on."""

    weights: Weights
    progress: Progress
    between_steps: BetweenSteps | None
    model: nn.Module | None = None
    data: CalibrationData | None = None


@dataclass(frozen=True)
class _Drop:
    asked: float
    count: int


def sparsify_(
    model: nn.Module,
    stage: SparsityStage,
    plan: Plan,
    progress: Progress = quiet,
    between_steps: BetweenSteps | None = None,
    data: CalibrationData | None = None,
) -> dict[str, LayerSparsity]:
    """Zero or remove the planned share of every layer the stage names; module name → what happened.

    `between_steps(s)` is called after every step s of a gradual schedule but the last, with the caller's gradient mode: the
    place for recovery training. `data`: for stages with `needs_data`. Weights that are zero before
    the call are zero again after it.
    Raises PlanError where the model is not the planned one or the zeros found afterwards are fewer than the plan's.
    """
    weights = planned_weights(model, plan.prunable(stage))
    sizes = {name: weight.numel() for name, weight in weights.items()}
    drops = _prune_(stage, _Run(weights, progress, between_steps, model, data))
    wrong = [f"{name}: planned or touched, not both" for name in sorted(weights.keys() ^ drops.keys())]
    results: dict[str, LayerSparsity] = {}
    for name, weight in weights.items():
        if (drop := drops.get(name)) is None:
            continue
        results[name] = LayerSparsity(drop.asked, drop.count, sizes[name] - int(weight.count_nonzero()), sizes[name])
        if results[name].zeros < drop.count:
            wrong.append(f"{name}: {drop.count} weights were to fall, {results[name].zeros} are zero")
    if wrong:
        raise PlanError(f"the sparsity stage {stage.method} did not do what was planned:\n  " + "\n  ".join(wrong))
    return results


@singledispatch
def _prune_(stage: object, run: _Run) -> dict[str, _Drop]:
    """Zero what one kind of stage asks for. A new method registers its own handler."""
    raise NotImplementedError(f"sparsify_ has no handler for {type(stage).__name__}")


@_prune_.register
def _(stage: Magnitude, run: _Run) -> dict[str, _Drop]:
    if stage.pattern == "global":
        return _global_magnitude_(stage, run)
    return _by_magnitude_(stage, stage.ratio, run, 1, 1)


@_prune_.register
def _(stage: Gradual, run: _Run) -> dict[str, _Drop]:
    drops: dict[str, _Drop] = {}
    for step in range(1, stage.schedule.steps + 1):
        drops = _by_magnitude_(stage, ratio_after(step, stage.ratio, stage.schedule), run, step, stage.schedule.steps)
        if run.between_steps and step < stage.schedule.steps:
            dropped = {name: weight.detach() == 0 for name, weight in run.weights.items()}
            run.between_steps(step)
            for name, weight in run.weights.items():
                weight.detach().masked_fill_(dropped[name], 0)
    return drops


@_prune_.register
def _(stage: LayerNorm, run: _Run) -> dict[str, _Drop]:
    sizes = [weight.numel() for weight in run.weights.values()]
    counts = layer_norm_counts([scores.rms(weight) for weight in run.weights.values()], sizes, stage.ratio)
    drops: dict[str, _Drop] = {}
    for done, ((name, weight), count) in enumerate(zip(run.weights.items(), counts, strict=True), start=1):
        _keep_(weight, masks.per_layer(scores.magnitude(weight), count))
        drops[name] = _Drop(count / weight.numel(), count)
        run.progress(done, len(sizes), name)
    return drops


@_prune_.register
def _(stage: Rows, run: _Run) -> dict[str, _Drop]:
    drops: dict[str, _Drop] = {}
    for done, (name, weight) in enumerate(run.weights.items(), start=1):
        count = dropped_count(pool_size(stage, tuple(weight.shape)), stage.ratio)
        _keep_(weight, masks.rows(scores.row_norm(weight), count))
        drops[name] = _Drop(stage.ratio, count * weight.shape[1])
        run.progress(done, len(run.weights), name)
    return drops


def _global_magnitude_(stage: Magnitude, run: _Run) -> dict[str, _Drop]:
    sizes = [weight.numel() for weight in run.weights.values()]
    total = dropped_count(sum(sizes), stage.ratio)
    counts = masks.global_counts(lambda: (scores.magnitude(weight) for weight in run.weights.values()), total)
    drops: dict[str, _Drop] = {}
    for done, ((name, weight), count) in enumerate(zip(run.weights.items(), counts, strict=True), start=1):
        _keep_(weight, masks.per_layer(scores.magnitude(weight), count))
        drops[name] = _Drop(count / weight.numel(), count)
        run.progress(done, len(sizes), name)
    return drops


def _by_magnitude_(stage: Magnitude | Gradual, ratio: float, run: _Run, step: int, steps: int) -> dict[str, _Drop]:
    """Zero the smallest |W| of every layer, up to a ratio that counts what is zero already. Step 1..steps of a schedule."""
    drops: dict[str, _Drop] = {}
    for done, (name, weight) in enumerate(run.weights.items(), start=1):
        pool = pool_size(stage, tuple(weight.shape))
        count = dropped_count(pool, ratio)
        _keep_(weight, masks.of_pattern(scores.magnitude(weight), stage.pattern, count))
        drops[name] = _Drop(ratio, count * (weight.numel() // pool))
        run.progress((step - 1) * len(run.weights) + done, steps * len(run.weights), name)
    return drops


def _keep_(weight: nn.Parameter, keep: Tensor) -> None:
    weight.detach().masked_fill_(~keep, 0)
