"""Whether a finished checkpoint is what a recipe makes of its weights and data."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_opt import checkpoint, gemma
from gemma_opt.errors import BaseModelError, RecipeError
from gemma_opt.identity import differences, identity_of
from gemma_opt.recipe import Recipe

PINNED = {"base": "org/name", "revision": "0" * 40}


def manifest(recipe: Recipe, base: dict[str, object]) -> checkpoint.Manifest:
    """One without files: the identity is all that is asked for."""
    return checkpoint.Manifest(recipe_digest=recipe.digest(), base=base, versions={}, plan=[], measured={}, files={})


def rules(text: Path, **more: object) -> Recipe:
    tree = {
        "name": "test",
        "model": {"base": "small-gemma3"},
        "calibration": {"source": [str(text)]},
        "sparsity": [{"method": "wanda", "ratio": 0.5}],
    }
    return Recipe.from_tree(tree | more, "test")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("one")
    return file


def test_other_data_under_the_same_name_is_other_data(text: Path) -> None:
    recipe = rules(text, distill={"data": [str(text)], "steps": 1})
    built = manifest(recipe, identity_of(recipe, gemma.locate(recipe.model)))
    assert differences(built, recipe) == []
    text.write_text("two")
    assert differences(built, recipe) == ["calibration data", "distill data"]
    text.unlink()
    with pytest.raises(RecipeError, match="there is no file"):
        differences(built, recipe)


def test_another_recipe_is_told_before_anything_is_read(text: Path) -> None:
    built = manifest(rules(text), {})
    assert differences(built, rules(text, model={"base": "/nowhere"})) == ["recipe"]


def test_a_commit_of_the_hub_is_known_without_its_files(text: Path) -> None:
    """8 GB need not be hashed, nor downloaded again, to find out that there is nothing to do."""
    recipe = rules(text, model=PINNED)
    data = identity_of(rules(text), gemma.locate(rules(text).model))
    built = manifest(recipe, data | {"name": PINNED["base"], "revision": PINNED["revision"], "files": {"a": "b"}})
    assert differences(built, recipe) == []
    assert differences(built, recipe, base="small-gemma3") == ["base weights"]
    with pytest.raises(BaseModelError, match="neither a folder"):
        differences(built, recipe, base="/nowhere")


def test_another_teacher_is_named(text: Path) -> None:
    def taught(**teacher: object) -> Recipe:
        return rules(text, distill={"data": ["charts"], "steps": 1} | teacher)

    recipe = taught(teacher="small-gemma3")
    identity = identity_of(recipe, gemma.locate(recipe.model))
    assert differences(manifest(recipe, identity), recipe) == []
    assert differences(manifest(recipe, identity | {"teacher": {"files": {"other": "hash"}}}), recipe) == ["teacher"]
    assert differences(manifest(taught(), identity), taught()) == ["teacher"]
