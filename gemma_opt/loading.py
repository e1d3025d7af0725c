"""What a MODEL argument means, and how a ready model comes of it.

There are two starts and one path: a finished checkpoint is loaded, base weights are compressed by the same pipeline
that built it. First match wins: a finished folder, a base folder, a GGUF file, a recipe file or packaged recipe's name.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from gemma_opt import checkpoint, gemma, pipeline
from gemma_opt.errors import NeedsBuild, RecipeMismatch, RecipeNotFound
from gemma_opt.policy import Plan, refuse_context
from gemma_opt.recipe import (
    FP8_FORMATS,
    BaseModelSection,
    EngineSection,
    Fp32,
    Quantization,
    Recipe,
    RoleFormats,
    packaged_recipes,
)

log = logging.getLogger(__name__)

DEFAULT_RECIPE = "small-int8"
DENSE_CONTEXT = 8192


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a finished folder, or (folder None) a recipe whose base weights are compressed now."""

    recipe: Recipe
    folder: Path | None = None


@dataclass(frozen=True)
class Ready:
    """A model that can answer. context: tokens one slot holds."""

    recipe: Recipe
    model: gemma.GemmaModel
    processing: gemma.Processing
    plan: Plan

    @property
    def context(self) -> int:
        """Tokens a prompt and its answer may have together."""
        return self.recipe.engine.context


def resolve(argument: str, device: str | None = None) -> Source:
    """Find out what a MODEL argument names, without reading weights. device: on which it will run.

    Raises RecipeNotFound, RecipeError, RecipeMismatch, CorruptCheckpoint, and UsageError for no such device.
    """
    path = Path(argument).expanduser()
    if checkpoint.is_finished(path):
        return Source(checkpoint.read_recipe(path), path)
    if (path / "config.json").is_file() or path.suffix == ".gguf" or argument in gemma.BUNDLED:
        return Source(dense_recipe(argument, device))
    try:
        return prefer_finished(Recipe.load(argument))
    except RecipeNotFound:
        if path.exists() or argument.count("/") > 0:
            raise RecipeNotFound(
                f"{argument} is neither a checkpoint, a base model's folder, a .gguf file nor a recipe"
            ) from None
        raise


def source_from_environment() -> Source:
    """The predictor's model: GEMMA_OPT_MODEL, else GEMMA_OPT_RECIPE, else the bundled small model."""
    if argument := os.environ.get("GEMMA_OPT_MODEL"):
        return resolve(argument)
    name = os.environ.get("GEMMA_OPT_RECIPE")
    if not name:
        log.info("neither GEMMA_OPT_MODEL nor GEMMA_OPT_RECIPE is set: serving the bundled small model (%s)", DEFAULT_RECIPE)
    return prefer_finished(Recipe.load(name or DEFAULT_RECIPE))


def prefer_finished(recipe: Recipe) -> Source:
    """The finished folder of a recipe if it was built, else the recipe itself.

    Raises RecipeMismatch (E3003) if the folder was built from another recipe of that name.
    """
    folder = default_folder(recipe)
    if not checkpoint.is_finished(folder):
        return Source(recipe)
    if checkpoint.read_manifest(folder).recipe_digest != recipe.digest():
        raise RecipeMismatch(
            f"{folder} was built from another version of recipe {recipe.name}. "
            f"Build it again with: python -m gemma_opt compress {recipe.name} --force"
        )
    return Source(recipe, folder)


def default_folder(recipe: Recipe) -> Path:
    """Where `compress` puts a recipe's checkpoint unless told otherwise."""
    return gemma.WEIGHTS_CACHE / recipe.name


def dense_recipe(base: str, device: str | None = None) -> Recipe:
    """The recipe that serves base weights as they are: float32 on the CPU, bfloat16 on a GPU."""
    if gemma.device_of(device).type == "cuda":
        return Recipe(name="dense", model=BaseModelSection(base=base), engine=EngineSection(context=DENSE_CONTEXT))
    exact = Quantization(default=Fp32(), roles=RoleFormats(vision=Fp32(), projector=Fp32(), embedding=Fp32()))
    section = BaseModelSection(base=base, dtype="float32")
    return Recipe(name="dense", model=section, quantization=exact, engine=EngineSection(context=DENSE_CONTEXT))


def open_model(source: Source, device: str | None = None) -> Ready:
    """Load the finished checkpoint, or load and compress the base weights.

    Raises CheckpointError, PlanError, NeedsBuild (the recipe needs data, and is compressed at build time only).
    """
    if source.folder is None and source.recipe.needs_data:
        raise NeedsBuild(
            f"recipe {source.recipe.name} needs calibration data and has not been built. "
            f"Build it with: python -m gemma_opt compress {source.recipe.name}"
        )
    place = gemma.device_of(device)
    if source.folder:
        loaded = checkpoint.load(source.folder, place)
        refuse_context(loaded.model, source.recipe.engine.context)
        ready = Ready(source.recipe, loaded.model, loaded.processing, loaded.plan)
    else:
        recipe = source.recipe
        files = gemma.locate(recipe.model, recipe=recipe.name if recipe.name in packaged_recipes() else "RECIPE")
        if recipe.name != "dense":
            log.info(
                "compressing %s now; `python -m gemma_opt compress %s` once would save this at every start",
                recipe.name,
                recipe.name,
            )
        base = gemma.load_base(files, gemma.DTYPES[recipe.model.dtype], place)
        refuse_context(base.model, recipe.engine.context)
        ready = Ready(recipe, base.model, base.processing, pipeline.compress(base.model, recipe))
    if place.type == "cpu" and (
        emulated := {str(row.format) for row in ready.plan.rows if isinstance(row.format, FP8_FORMATS)}
    ):
        log.info("%s on the CPU is emulated: the values are right, nothing is faster", " and ".join(sorted(emulated)))
    return ready
