"""The order in which a model is compressed: check, plan, sparsify, quantize. Everything happens in place.

Each stage is reconciled with the plan by its own room; this module only knows who comes when.
"""

from __future__ import annotations

from collections.abc import Callable

from gemma_opt.gemma import GemmaModel
from gemma_opt.policy import Plan, plan
from gemma_opt.quantization.weights import quantize_, sanitize_
from gemma_opt.recipe import Recipe
from gemma_opt.sparsity.apply import sparsify_

Progress = Callable[[str, int, int], None]  # stage, layers done, layers in all


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def compress(model: GemmaModel, recipe: Recipe, progress: Progress = silent) -> Plan:
    """Compress `model` in place as the recipe says. Returns the plan, with the ratios that were really asked of layers.

    Raises WeightsError (NaN, infinite or missing weights), PlanError (the recipe does not fit the model).
    """
    sanitize_(model)
    planned = plan(model, recipe)
    for number, stage in enumerate(recipe.sparsity, start=1):
        title = f"sparsify {number}/{len(recipe.sparsity)} ({stage.method})"
        results = sparsify_(model, stage, planned, lambda done, total, _, title=title: progress(title, done, total))
        planned = planned.with_ratios({name: result.asked for name, result in results.items()})
    quantize_(model, planned, lambda done, total, _: progress("quantize", done, total))
    return planned
