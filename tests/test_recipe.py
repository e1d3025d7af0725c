"""Recipes: what is read, what is refused, and that nothing is refused without saying where and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gemma_opt.errors import RecipeError, RecipeNotFound
from gemma_opt.recipe import TEXT_ROLES, Gradual, Int4, Int8, Recipe, packaged_recipes

PRUNED = "small-int8-pruned"


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_load_under_their_own_name_and_survive_a_round_trip(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert Recipe.from_tree(yaml.safe_load(recipe.to_yaml()), "again") == recipe


def test_the_method_picks_the_class() -> None:
    (stage,) = Recipe.load(PRUNED).sparsity
    assert isinstance(stage, Gradual)
    assert stage.schedule.steps == 10


def test_overrides_reach_into_lists_and_make_missing_sections() -> None:
    recipe = Recipe.load(
        "small-bf16", ("sparsity=[{method: rows, ratio: 0.1}]", "sparsity.0.ratio=0.3", "quantization.roles.vision=int8")
    )
    assert recipe.sparsity[0].ratio == 0.3
    assert recipe.quantization.roles.vision == Int8()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sparsty=1", "sparsty: unknown key"),
        ("sparsity.0.ratio=0.9", "sparsity.0.gradual.ratio"),
        ("sparsity.0.ratio=0", "sparsity.0.gradual.ratio"),
        ("sparsity.0.ratio=.nan", "sparsity.0.gradual.ratio"),
        ("sparsity.0.method=prune", "sparsity.0"),
        ("sparsity.0.method=wanda", "sparsity.0.wanda.schedule: unknown key"),
        ("sparsity=[{method: wanda, ratio: 0.3}]", "wanda need data: add a section `calibration"),
        ("sparsity=[{method: magnitude, ratio: 0.5, pattern: 2:4}]", "write it in quotes"),
        ("sparsity=[{method: magnitude, ratio: 0.3, pattern: '2:4'}]", "keeps 2 of every 4 weights: its ratio is not 0.3"),
        ("sparsity=[{method: magnitude, ratio: 0.5, pattern: '4:2'}]", "keeps 4 of every 2"),
        ("sparsity=[{method: wanda, ratio: 0.5, roles: [vision]}]", "sparsity.0.wanda.roles.0"),
        ("sparsity=[{method: wanda, ratio: 0.5, allocation: sensitivity}]", "needs pattern: per_layer"),
        ("sparsity=[{method: compact, ratio: 0.5, roles: [up]}]", "sparsity.0.compact.roles: unknown key"),
        ("calibration={source: []}", "calibration.source"),
        ("calibration={source: [x], windows: 0}", "calibration.windows"),
        ("sparsity.0.pattern=2:4", "sparsity.0.gradual.pattern"),
        ("sparsity.0.schedule=null", "sparsity.0.gradual.schedule"),
        ("sparsity.0.roles=[query, embedding]", "sparsity.0.gradual.roles.1"),
        ("sparsity.0.roles=[query, query]", "a role is named twice"),
        ("quantization.default=int3", "quantization.default"),
        ("quantization.roles.head=int8", "quantization.roles.head"),
        ("quantization.roles.embedding=int4", "quantization.roles.embedding"),
        ("quantization.roles.projector=int8", "quantization.roles.projector"),
        ("quantization.default={format: int4, group: 48}", "quantization.default.int4.group"),
        ("quantization.default={format: int8, group: 32}", "quantization.default.int8.group: unknown key"),
        ("quantization.default={group: 32}", "quantization.default"),
        ("quantization.default=tied", "quantization.default"),
        ("model.dtype=float16", "model.dtype"),
        ("model.revision=main", "model.revision"),
        ("model.base=", "model.base"),
        ("compile.targets=[decode, mlp]", "name one of decode and mlp"),
        ("compile.targets=[mlp]", "the fast engine runs no MLP modules"),
        ("engine.kind=faster", "engine.kind"),
        ("engine.lookup=16", "engine.lookup"),
        ("engine.slots=0", "engine.slots"),
        ("sparsity.7.ratio=0.1", "the list has 1 entries"),
        ("name.x=1", "no section to hold"),
        ("ratio", "not KEY=VALUE"),
        ("quantization=[", "override 'quantization=[': the value is not YAML"),
        ("description=2024-99-99", "override 'description=2024-99-99': the value is not YAML"),
    ],
)
def test_what_is_wrong_is_named(override: str, named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(PRUNED, (override,))
    assert str(caught.value).startswith("E2001 ")
    assert named in str(caught.value)


def test_all_offenders_are_listed_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(PRUNED, ("colour=red", "engine.queue=-1", "sparsity.0.ratio=2"))
    assert all(where in str(caught.value) for where in ("colour", "engine.queue", "sparsity.0.gradual.ratio"))


def test_formats_are_names_or_names_with_options() -> None:
    short = Recipe.load("small-int8", ("quantization.default=int4",)).quantization
    long = Recipe.load("small-int8", ("quantization.default={format: int4, group: 32}",)).quantization
    assert short == long
    assert short.default == Int4()
    assert short.of_role("query") == Int4()
    assert short.of_role("vision") == Int8()
    assert short.formats().keys() == {*TEXT_ROLES, "vision", "projector", "embedding", "head"}


def test_written_recipes_spell_options_out_so_that_new_defaults_cannot_change_them() -> None:
    tree = yaml.safe_load(Recipe.load("small-int8", ("quantization.default=int4",)).to_yaml())["quantization"]
    assert tree["default"].keys() == {"format", *Int4.model_fields}
    assert tree["roles"] == {"vision": "int8", "projector": "bf16", "embedding": "int8", "head": "tied"}


@pytest.mark.parametrize("stored", ["int8_dynamic", "int4", "int8_dynamic_int4", "fp8_dynamic", "int8_static", "fp8_static"])
def test_a_written_null_survives_where_the_default_is_a_number(stored: str) -> None:
    """recipe.yaml once left every null out: `smooth: null` came back as 0.5, another recipe with another digest."""
    overrides = (f"quantization.default={{format: {stored}, smooth: null}}", "calibration={source: [charts]}")
    recipe = Recipe.load("small-int8", overrides)
    again = Recipe.from_tree(yaml.safe_load(recipe.to_yaml()), "again")
    assert again == recipe
    assert (
        again.digest()
        == recipe.digest()
        != Recipe.load("small-int8", (overrides[0].replace("null", "0.4"), overrides[1])).digest()
    )


def test_nulls_that_are_defaults_are_not_written() -> None:
    assert "null" not in Recipe.load("small-int8").to_yaml()


def test_fp32_weights_need_fp32_activations() -> None:
    with pytest.raises(RecipeError, match="fp32 weights need"):
        Recipe.load("gemma-3-4b-int8", ("quantization.default=fp32",))


def test_a_revision_pins_hub_ids_only() -> None:
    with pytest.raises(RecipeError, match="a revision pins a hub id"):
        Recipe.load("small-bf16", (f"model.revision={'a' * 40}",))


def test_compact_comes_first() -> None:
    stages = "sparsity=[{method: magnitude, ratio: 0.3}, {method: compact, ratio: 0.25}]"
    with pytest.raises(RecipeError, match="would revive earlier zeros: put it first"):
        Recipe.load("small-bf16", (stages, "calibration={source: [charts]}"))


@pytest.mark.parametrize("stage", ["magnitude", "sparsegpt"])
def test_n_m_sparsity_with_int4_is_refused_with_the_reason(stage: str) -> None:
    overrides = (f"sparsity=[{{method: {stage}, ratio: 0.5, pattern: '2:4'}}]", "calibration={source: [charts]}")
    with pytest.raises(RecipeError, match="none multiply int4 g32: the zeros would cost quality and save nothing"):
        Recipe.load("small-int4", overrides)
    Recipe.load("small-int8", overrides)
    Recipe.load("small-int4", (overrides[0].replace("'2:4'", "per_row"), overrides[1]))


def test_recipes_say_whether_they_need_data() -> None:
    assert Recipe.load("gemma-3-4b-int8-compact25").needs_data
    assert not Recipe.load(PRUNED).needs_data


def test_calibration_that_nothing_uses_is_not_part_of_the_digest() -> None:
    unused = Recipe.load(PRUNED, ("calibration={source: [charts]}",))
    assert unused.digest() == Recipe.load(PRUNED).digest()
    used = Recipe.load("small-int8-compact25")
    assert Recipe.load("small-int8-compact25", ("calibration.seed=1",)).digest() != used.digest()


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RecipeNotFound, match=r"packaged recipes: .*small-int8"):
        Recipe.load("small-int9")


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2", "", "\x00", "description: 2024-99-99"])
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError):
        Recipe.load(file)


def test_missing_files_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(RecipeNotFound):
        Recipe.load(tmp_path / "none.yaml")


def test_packaged_recipes_compile_what_they_name() -> None:
    """The story: the 4B recipes named `decode`, and the engine they run on has a decode step of its own."""
    for name in packaged_recipes():
        recipe = Recipe.load(name)
        assert recipe.compiled == recipe.compile.targets
    both = ("compile.targets=[decode, vision]",)
    assert Recipe.load(PRUNED, both).compiled == ("vision",)
    assert Recipe.load(PRUNED, (*both, "engine.kind=reference")).compiled == ("decode", "vision")


def test_the_digest_is_that_of_the_weights() -> None:
    base = Recipe.load(PRUNED)
    same = Recipe.load(PRUNED, ("name=other", "engine.queue=3", "compile.targets=[vision]", "description=x"))
    assert same.digest() == base.digest()
    for override in ("sparsity.0.ratio=0.3", "quantization.default=bf16", "model.base=elsewhere"):
        assert Recipe.load(PRUNED, (override,)).digest() != base.digest()
