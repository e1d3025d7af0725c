"""Low rank. Oracles: Eckart–Young, the error of the output on the calibration data, and exact counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from models import chart, fresh_model, oracle_inputs, processing
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM

from gemma_opt import checkpoint, inspection, lowrank, pipeline
from gemma_opt.calibration import CalibrationData, Sample, Store, draw_samples, walk_layers
from gemma_opt.distill import DistillData
from gemma_opt.errors import PlanError, RecipeError, WeightsError
from gemma_opt.lowrank import LowRankLinear, decompose, whitening
from gemma_opt.policy import Role, plan, role_of
from gemma_opt.prompt import PromptEncoder, single_turn
from gemma_opt.recipe import Recipe
from gemma_opt.staging import staging
from tests.shapes import gemma_4b, small_text_model
from tests.test_calibration import plain_inputs

EXACT = {"default": "fp32", "roles": {"embedding": "fp32"}}
DOWN = {"roles": ["down"], "ratio": 0.5, "multiple": 1}
UP = "model.layers.1.mlp.up_proj"


def samples(count: int = 6) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(Sample(torch.randint(3, 128, (1, 48), generator=generator)) for _ in range(count))


def rules(*sections: Mapping[str, object], **rest: object) -> Recipe:
    tree: dict[str, object] = {"name": "test", "model": {"base": "small-gemma3", "dtype": "float32"}, "quantization": EXACT}
    tree |= {"calibration": {"source": ["unused"]}, "lowrank": [dict(section) for section in sections]}
    return Recipe.from_tree(tree | rest, "test")


def factorized(recipe: Recipe, store: Store | None = None) -> Gemma3ForCausalLM:
    model = small_text_model()
    pipeline.compress(model, recipe, data=CalibrationData(samples(), store or Store()))
    return model


def factors_of(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    module = cast(LowRankLinear, model.get_submodule(name))
    return module.left.get_parameter("weight").detach(), module.right.get_parameter("weight").detach()


def weight_and_inputs() -> tuple[Tensor, Tensor]:
    """A weight [10, 16] and correlated inputs [400, 16]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    return torch.randn(10, 16, generator=generator), x


# Pure maths


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_plain_factors_leave_exactly_the_singular_values_that_were_cut(rank: int) -> None:
    weight, _ = weight_and_inputs()
    left, right = decompose(weight).factors(rank)
    assert (left.shape, right.shape) == ((10, rank), (rank, 16))
    rest = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close((weight - left @ right).square().sum(), rest, rtol=1e-4, atol=1e-4)


def test_whitened_factors_keep_the_output_as_well_as_any_of_their_rank_can() -> None:
    weight, x = weight_and_inputs()
    left, right = decompose(weight, whitening(x.T @ x / len(x), 1e-7)).factors(4)
    error = (x @ (weight - left @ right).T).square().sum()
    best = torch.linalg.svdvals(x @ weight.T)[4:].square().sum()  # Eckart–Young on the outputs themselves
    torch.testing.assert_close(error, best, rtol=1e-3, atol=1e-3)
    plain_left, plain_right = decompose(weight).factors(4)
    assert error < 0.8 * (x @ (weight - plain_left @ plain_right).T).square().sum()


def test_the_factors_share_the_singular_values_evenly() -> None:
    weight, _ = weight_and_inputs()
    left, right = decompose(weight).factors(5)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_the_rank_of_an_energy() -> None:
    found = decompose(torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])))  # squares 9, 4, 1, 1, 1 of 16
    assert [found.rank_of_energy(energy) for energy in (0.1, 0.5625, 0.57, 0.8, 0.8125, 0.82, 0.999)] == [1, 1, 2, 2, 2, 3, 5]


def test_broken_moments_are_an_error_and_unused_inputs_are_not() -> None:
    with pytest.raises(WeightsError, match="raise `damping`"):
        whitening(torch.tensor([[1.0, 4.0], [4.0, 1.0]]), 0.01)
    assert whitening(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 0.01).isfinite().all()


# In a model


def test_a_plain_section_needs_no_data() -> None:
    model = small_text_model()
    recipe = rules(DOWN | {"whiten": False, "ratio": 0.3}, calibration=None)
    assert not recipe.needs_data
    pipeline.compress(model, recipe)
    left, right = factors_of(model, "model.layers.1.mlp.down_proj")
    assert (left.shape, right.shape) == ((32, 13), (13, 48))  # 32·48/(32+48)·0.7 = 13.44
    weight = small_text_model().get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    torch.testing.assert_close((left @ right - weight).square().sum(), torch.linalg.svdvals(weight)[13:].square().sum())


def test_whitening_measures_behind_what_was_factorized_before() -> None:
    model, dense = factorized(rules({"roles": ["query", "up"], "ratio": 0.5, "multiple": 1})), small_text_model()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", UP]
    for number, (name, rank) in enumerate(zip(names, (8, 10, 8, 10), strict=True)):
        twin = small_text_model()  # what the layer reads: every earlier one replaced, itself still dense
        for earlier in names[:number]:
            twin.set_submodule(earlier, model.get_submodule(earlier))
        x = plain_inputs(twin, samples(), name)
        weight = dense.get_parameter(f"{name}.weight").detach()
        left, right = factors_of(model, name)
        expected = decompose(weight, whitening(x.T @ x / len(x), 0.01)).factors(rank)
        torch.testing.assert_close(left @ right, expected[0] @ expected[1], rtol=1e-3, atol=1e-4)


def output_error(model: nn.Module) -> float:
    dense = small_text_model()
    with torch.no_grad():
        pairs = [(model(sample.token_ids).logits, dense(sample.token_ids).logits) for sample in samples()]
    return float(sum((one - other).square().mean() for one, other in pairs))


def test_whitening_helps_on_the_calibration_data() -> None:
    every = {"roles": ["query", "key", "value", "output", "gate", "up", "down"], "ratio": 0.3, "multiple": 1}
    assert output_error(factorized(rules(every))) < output_error(factorized(rules(every | {"whiten": False})))


def test_the_plan_has_the_factors_and_their_bytes() -> None:
    recipe = rules({"roles": ["down"], "ratio": 0.5, "multiple": 32}, model={"base": "x"}, quantization={"default": "int8"})
    drawn, dense = plan(gemma_4b(), recipe), plan(gemma_4b(), rules(model={"base": "x"}, quantization={"default": "int8"}))
    down = "model.language_model.layers.3.mlp.down_proj"
    left, right = drawn[f"{down}.left"], drawn[f"{down}.right"]
    rank = 32 * round(2560 * 10240 / 12800 * 0.5 / 32)  # 1024
    assert (left.shape, right.shape) == ((2560, rank), (rank, 10240))
    assert (left.bytes, right.bytes) == (2560 * rank + 4 * 2560, 10240 * rank + 4 * rank)
    assert (left.role, left.kind, str(left.format)) == (Role.DOWN, "linear", "int8")
    assert down not in drawn.by_name
    assert drawn.parameters == dense.parameters - 34 * (2560 * 10240 - rank * 12800)
    assert role_of(f"{down}.left") == Role.DOWN


def test_every_layer_that_would_not_shrink_is_named_before_anything_is_done() -> None:
    with pytest.raises(PlanError) as caught:
        plan(small_text_model(), rules({"roles": ["query", "down"], "ratio": 0.1, "multiple": 20}))
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 4
    assert "model.layers.0.self_attn.q_proj [32, 32]: factors of rank 20 would save nothing" in lines[0]
    with pytest.raises(PlanError, match="factors of rank 16 would save nothing"):  # as large as the layer is no saving
        plan(small_text_model(), rules({"roles": ["query"], "ratio": 0.01, "multiple": 16}))


def test_every_layer_whose_energy_is_too_high_is_named() -> None:
    with pytest.raises(PlanError) as caught:
        factorized(rules({"roles": ["up", "down"], "energy": 0.999, "multiple": 4}))
    assert len(str(caught.value).splitlines()) == 5
    assert "an energy of 0.999 takes rank 32" in str(caught.value)


@pytest.mark.parametrize("whiten", [True, False])
def test_an_energy_gives_every_layer_the_smallest_rank_that_keeps_it(whiten: bool) -> None:
    model = small_text_model()
    recipe = rules({"roles": ["query", "down"], "energy": 0.6, "multiple": 1, "whiten": whiten})
    planned = pipeline.compress(model, recipe, data=CalibrationData(samples(), Store()))
    bound = plan(small_text_model(), recipe)
    ranks = {row.name: row.shape[1] for row in planned.rows if row.name.endswith(".left")}
    assert len(ranks) == 4
    assert all(ranks[name] <= bound[name].shape[1] for name in ranks)
    assert planned.bytes < bound.bytes < plan(small_text_model(), rules()).bytes
    if not whiten:
        for name, rank in ranks.items():
            weight = small_text_model().get_parameter(name.replace(".left", ".weight")).detach()
            share = torch.linalg.svdvals(weight).square().cumsum(0) / weight.square().sum()
            assert share[rank - 1] >= 0.6 > share[rank - 2]


def test_later_walks_know_that_left_reads_what_right_gives() -> None:
    """Both factors have one role; grouped with the layer's other readers, left would get moments of the wrong tensor."""
    model = factorized(rules(DOWN, DOWN | {"roles": ["up"]}))
    names = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj.left", "up_proj.right", "down_proj.left")]
    block = next(walk_layers(model, samples()))
    assert block.steps(names) == [[names[0], names[2]], [names[1]], [names[3]]]
    moments = block.moments(names)
    for name in names:
        x = plain_inputs(model, samples(), name)
        weight = torch.ones(1)
        if "down" in name:  # both factors' tokens count by what the whole linear gives
            weight = 1 / model.get_submodule(name)(x).detach().square().mean(dim=1, keepdim=True)
        torch.testing.assert_close(moments[name].hessian, (weight * x).T @ x / len(x))
    name = "model.layers.0.mlp.down_proj.right"
    x = plain_inputs(model, samples(), name)
    weight = 1 / model.get_submodule("model.layers.0.mlp.down_proj")(x).detach().square().mean(dim=1, keepdim=True)
    torch.testing.assert_close(block.moments([name])[name].hessian, (weight * x).T @ x / len(x))


class Killed(Exception):
    """Stands for the end of the process."""


def test_it_goes_on_after_a_kill_with_the_same_result(tmp_path: Path) -> None:
    recipe = rules({"roles": ["query", "up", "down"], "ratio": 0.5, "multiple": 1})
    whole = factorized(recipe)

    def kill(title: str, done: int, total: int) -> None:
        if done == 5:
            raise Killed

    data = CalibrationData(samples(), Store(tmp_path / "work", {"x": 1}))
    with pytest.raises(Killed):
        pipeline.compress(small_text_model(), recipe, kill, data)
    assert len(list((tmp_path / "work").glob("lowrank.*"))) == 1
    resumed = factorized(recipe, Store(tmp_path / "work", {"x": 1}))
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


# With the other stages


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"lowrank": {"roles": ["down"]}}, "exactly one of ratio and energy"),
        ({"lowrank": {"roles": ["down"], "ratio": 0.5, "energy": 0.9}}, "exactly one of ratio and energy"),
        ({"lowrank": {"roles": ["vision"], "ratio": 0.5}}, "lowrank.0.roles.0"),
        ({"lowrank": [DOWN, DOWN]}, "down named twice"),
        ({"lowrank": DOWN, "calibration": None}, "lowrank with whiten need data"),
        ({"lowrank": DOWN, "sparsity": [{"method": "magnitude", "ratio": 0.5}]}, "would be dense, and the zeros"),
    ],
    ids=str,
)
def test_sections_that_cannot_be_are_refused(tree: dict[str, object], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        rules(**tree)
    assert named in str(caught.value)


def test_compact_low_rank_and_distillation_follow_each_other() -> None:
    distill = {"data": ["x"], "steps": 30, "batch": 4, "learning_rate": 0.003, "precision": "float32"}
    sparsity = [{"method": "compact", "ratio": 0.25, "multiple": 4}]
    before, after = small_text_model(), small_text_model()
    data = CalibrationData(samples(), Store())
    pipeline.compress(before, rules(DOWN, sparsity=sparsity), data=data)
    pipeline.compress(
        after, rules(DOWN, sparsity=sparsity, distill=distill), lambda *_: None, data, DistillData(samples(), Store())
    )
    left, right = factors_of(after, "model.layers.0.mlp.down_proj")
    assert (left.shape, right.shape) == ((32, 8), (8, 36))
    assert output_error(after) < 0.6 * output_error(before)


@pytest.mark.parametrize("stored", ["int8", "bf16", {"format": "int4", "group": 32}], ids=str)
def test_a_checkpoint_is_the_model_that_was_saved(stored: object, tmp_path: Path) -> None:
    tree = {"model": {"base": "small-gemma3", "dtype": "float32"}, "calibration": {"source": ["charts"], "windows": 2}}
    tree |= {"quantization": {"default": stored, "roles": {"vision": "int8", "embedding": "int8"}}}
    recipe = rules({"roles": ["down", "output"], "ratio": 0.4, "multiple": 32}, **tree)
    model = fresh_model()
    data = CalibrationData(draw_samples(recipe.calibration, processing()), Store())
    planned = pipeline.compress(model, recipe, data=data)
    layers = inspection.measure(model, planned)
    with staging(tmp_path / "out", 0) as folder:
        checkpoint.write(folder, model, processing(), recipe, layers, {"name": "small-gemma3"})
    loaded = checkpoint.load(tmp_path / "out", torch.device("cpu"))
    saved, found = (checkpoint.stored_tensors(item, planned) for item in (model, loaded.model))
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    down = "model.language_model.layers.0.mlp.down_proj"
    scales = {"int8": {"weight", "weight_scale"}, "bf16": {"weight"}}
    expected = scales.get(str(stored), {"weight_packed", "weight_scale", "weight_zero"})
    for side in ("left", "right"):
        assert {name.rpartition(".")[2] for name in found if name.startswith(f"{down}.{side}.")} == expected
    assert loaded.plan == planned
    assert planned.bytes == sum(tensor.nbytes for tensor in found.values())
    prompt = PromptEncoder(processing(), 512).encode(single_turn("Which bar is tallest?", "", [chart()]))
    with torch.inference_mode():
        one, other = (item(**oracle_inputs(item, prompt)).logits for item in (model, loaded.model))
    assert torch.equal(one, other)
    assert f"{down}.left" in [layer.row.name for layer in layers]


def test_a_damaged_plan_names_the_module() -> None:
    drawn = plan(small_text_model(), rules(DOWN))
    model = small_text_model()
    lowrank.empty_like_plan_(model, drawn)
    with pytest.raises(PlanError, match="is planned as low rank"):
        lowrank.empty_like_plan_(model, drawn)
