"""The order in which a model is compressed: check, plan, sparsify, factorize, distill, quantize. In place.

Each stage is reconciled with the plan by its own room; this module only knows who comes when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gemma_opt.calibration import CalibrationData
from gemma_opt.distill import DistillData, Recovery
from gemma_opt.errors import NeedsBuild
from gemma_opt.gemma import GemmaModel
from gemma_opt.lowrank import factorize_
from gemma_opt.policy import Plan, plan_stages, planned_weights
from gemma_opt.quantization.weights import quantize_, roundings, sanitize_
from gemma_opt.recipe import Compact, Recipe
from gemma_opt.sparsity.apply import sparsify_

Progress = Callable[[str, int, int], None]  # stage, layers done, layers in all


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def compress(
    model: GemmaModel,
    recipe: Recipe,
    progress: Progress = silent,
    data: CalibrationData | None = None,
    distill_data: DistillData | None = None,
) -> Plan:
    """Compress `model` in place as the recipe says. Returns the plan, with the largest ratio really asked of each layer.

    data, distill_data: for recipes with `needs_calibration` and with a distill section; what their stores already hold is
    not done again. Raises WeightsError (NaN, infinite or missing weights, a training that diverges), PlanError (the recipe
    does not fit the model), NeedsBuild (data is needed and not given).
    """
    if (recipe.needs_calibration and data is None) or (recipe.distill and distill_data is None):
        raise NeedsBuild(f"{recipe.name} needs data. Build it with: python -m gemma_opt compress {recipe.name}")
    sanitize_(model)
    plans = plan_stages(model, recipe)
    recovery: Recovery | None = None
    if recipe.distill and distill_data:
        recovery = Recovery(model, recipe.distill, distill_data, recipe.recovery_phases, progress)
    ratios: dict[str, float] = {}
    masked = frozenset[str]()
    for number, (stage, before, after) in enumerate(zip(recipe.sparsity, plans, plans[1:], strict=False), start=1):
        title = f"sparsify {number}/{len(recipe.sparsity)} ({stage.method})"
        if not isinstance(stage, Compact):
            masked |= {row.name for row in before.prunable(stage)}
        results = sparsify_(
            model,
            stage,
            before,
            lambda done, total, _, t=title: progress(t, done, total),
            between_steps=(lambda _, m=masked, r=recovery: r.train_(m)) if recovery else None,
            data=data and replace(data, store=data.store.section(f"{number}.")),
        )
        planned_weights(model, after.rows)  # raises where a stage left another shape than planned
        ratios |= {name: max(result.asked, ratios.get(name, 0.0)) for name, result in results.items()}
    planned = plans[len(recipe.sparsity)].with_ratios(ratios)
    if recipe.lowrank:
        given = data and replace(data, store=data.store.section("lowrank."))
        planned = factorize_(model, recipe.lowrank, planned, lambda done, total, _: progress("low rank", done, total), given)
    if recovery:
        recovery.train_(masked, roundings(planned))
    given = data and replace(data, store=data.store.section("quantize."))
    quantize_(model, planned, lambda done, total, _: progress("quantize", done, total), given)
    return planned
