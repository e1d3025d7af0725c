"""The order in which a model is compressed: check, plan, sparsify, quantize. Everything happens in place.

Each stage is reconciled with the plan by its own room; this module only knows who comes when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gemma_opt.calibration import CalibrationData
from gemma_opt.errors import NeedsBuild
from gemma_opt.gemma import GemmaModel
from gemma_opt.policy import Plan, plan_stages, planned_weights
from gemma_opt.quantization.weights import quantize_, sanitize_
from gemma_opt.recipe import Recipe
from gemma_opt.sparsity.apply import sparsify_

Progress = Callable[[str, int, int], None]  # stage, layers done, layers in all


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def compress(model: GemmaModel, recipe: Recipe, progress: Progress = silent, data: CalibrationData | None = None) -> Plan:
    """Compress `model` in place as the recipe says. Returns the plan, with the ratios that were really asked of layers.

    data: for recipes with `needs_data`; what its store already holds is not done again. Raises WeightsError (NaN, infinite
    or missing weights), PlanError (the recipe does not fit the model), NeedsBuild (data is needed and not given).
    """
    if recipe.needs_data and data is None:
        raise NeedsBuild(f"{recipe.name} needs calibration data. Build it with: python -m gemma_opt compress {recipe.name}")
    sanitize_(model)
    plans = plan_stages(model, recipe)
    ratios: dict[str, float] = {}
    for number, (stage, before, after) in enumerate(zip(recipe.sparsity, plans, plans[1:], strict=False), start=1):
        title = f"sparsify {number}/{len(recipe.sparsity)} ({stage.method})"
        given = data and replace(data, store=data.store.section(f"{number}."))
        results = sparsify_(model, stage, before, lambda done, total, _, t=title: progress(t, done, total), data=given)
        planned_weights(model, after.rows)  # raises where a stage left another shape than planned
        ratios |= {name: result.asked for name, result in results.items()}
    planned = plans[-1].with_ratios(ratios)
    given = data and replace(data, store=data.store.section("quantize."))
    quantize_(model, planned, lambda done, total, _: progress("quantize", done, total), given)
    return planned
