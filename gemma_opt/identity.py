"""What a checkpoint is made from beside its recipe: base weights, data, another teacher. Told apart by hashes.

A commit of the hub never changes, so weights of a hub id are the same where name and revision are: gigabytes need not be
hashed to find out that there is nothing to do, nor be on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from gemma_opt import gemma
from gemma_opt.calibration import sources_identity
from gemma_opt.checkpoint import Manifest
from gemma_opt.recipe import BaseModelSection, Recipe


def identity_of(recipe: Recipe, files: gemma.BaseFiles) -> dict[str, object]:
    """What a manifest records as its `base`. The only one who downloads: another teacher's weights, for their hashes.

    Raises RecipeError where a data file is missing, BaseModelError where a teacher is.
    """
    identity = files.identity() | data_identity(recipe)
    if teacher := _other_teacher(recipe):
        identity["teacher"] = gemma.locate(teacher, network=True).identity()
    return identity


def differences(manifest: Manifest, recipe: Recipe, base: str | None = None) -> list[str]:
    """In what a finished checkpoint is not what `recipe` makes of these base weights, in words; empty: it is just that.

    base: other weights for the same recipe. Raises as `identity_of`, and BaseModelError where there is no such base.
    """
    if manifest.recipe_digest != recipe.digest():
        return ["recipe"]
    recorded = manifest.base
    found = [] if _same_weights(recorded, recipe.model, base) else ["base weights"]
    data = data_identity(recipe)
    found += [f"{name} data" for name in ("calibration", "distill") if data.get(name) != recorded.get(name)]
    teacher, known = _other_teacher(recipe), cast(Mapping[str, object], recorded.get("teacher", {}))
    if (teacher is None and known) or (teacher and not _same_weights(known, teacher, None)):
        found.append("teacher")
    return found


def data_identity(recipe: Recipe) -> dict[str, object]:
    """sha256 of every file of the sections that are read, by section and by the name the recipe gives it.

    Raises RecipeError where one is missing.
    """
    identity: dict[str, object] = {}
    if recipe.needs_calibration and recipe.calibration:
        identity["calibration"] = sources_identity(recipe.calibration)
    if recipe.distill:
        identity["distill"] = sources_identity(recipe.distill.calibration, "distill.data")
    return identity


def _other_teacher(recipe: Recipe) -> BaseModelSection | None:
    teacher = recipe.distill.teacher if recipe.distill else "base"
    return None if teacher == "base" else teacher


def _same_weights(recorded: Mapping[str, object], section: BaseModelSection, override: str | None) -> bool:
    pinned = (section.base, section.revision)
    if override is None and section.revision:  # a hub's commit: what is recorded is that one or another
        return (recorded.get("name"), recorded.get("revision")) == pinned
    return gemma.locate(section, override).identity()["files"] == recorded.get("files")
