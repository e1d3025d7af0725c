"""Wanda, SparseGPT, ADMM and compact removal. Oracles: OBS with explicit inverses, plain solves, every mask there is."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path
from typing import cast

import pytest
import torch
from models import chart, fresh_model, oracle_inputs, processing
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

from gemma_opt import checkpoint, gemma, inspection, loading, pipeline
from gemma_opt.build import build
from gemma_opt.calibration import CalibrationData, Moments, Sample, Store, draw_samples, walk_layers
from gemma_opt.errors import NeedsBuild, PlanError, WeightsError
from gemma_opt.policy import dropped_count, plan, plan_stages
from gemma_opt.prompt import PromptEncoder, single_turn
from gemma_opt.recipe import Recipe
from gemma_opt.sparsity import blockwise, masks, quadratic, scores, sparsify_, structured
from gemma_opt.sparsity.admm import admm
from gemma_opt.sparsity.allocation import sensitivity_counts
from gemma_opt.sparsity.sparsegpt import sparsegpt
from gemma_opt.staging import staging
from tests.shapes import gemma_4b, small_text_model
from tests.test_calibration import linears, plain_inputs

RATIOS = [0.01, 0.3, 0.5, 0.77]
CALIBRATION = {"source": ["unused"], "windows": 4, "window_tokens": 64}
WANDA = {"method": "wanda", "ratio": 0.5}
SPARSEGPT = {"method": "sparsegpt", "ratio": 0.5}
ADMM = {"method": "admm", "ratio": 0.5, "steps": 20}
COMPACT = {"method": "compact", "ratio": 0.25, "multiple": 4}
EXACT = {"default": "fp32", "roles": {"embedding": "fp32"}}


def samples(count: int = 6) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(Sample(torch.randint(3, 128, (1, 48), generator=generator)) for _ in range(count))


def rules(*stages: Mapping[str, object]) -> Recipe:
    tree = {
        "name": "test",
        "model": {"base": "small-gemma3", "dtype": "float32"},
        "calibration": CALIBRATION,
        "sparsity": [dict(stage) for stage in stages],
        "quantization": EXACT,
    }
    return Recipe.from_tree(tree, "test")


def pruned(*stages: Mapping[str, object], store: Store | None = None) -> Gemma3ForCausalLM:
    model = small_text_model()
    pipeline.compress(model, rules(*stages), data=CalibrationData(samples(), store or Store()))
    return model


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A linear's weight."""
    return cast(nn.Linear, model.get_submodule(name)).weight.detach()


def problem(inputs: int = 12, tokens: int = 200, damping: float = 0.01) -> tuple[Tensor, quadratic.Quadratic]:
    """Correlated inputs [tokens, in] and their damped Hessian."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return x, quadratic.damped(x.T @ x / tokens, damping)


def random_weight(rows: int = 7, columns: int = 12) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


# Pure maths


def test_scores_on_a_small_matrix() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert scores.wanda(weight, torch.tensor([2.0, 0.5])).tolist() == [[6, 2], [0, 0.5]]
    assert scores.channel(weight, torch.tensor([2.0, 1.0])).tolist() == pytest.approx([6, 17**0.5])


def test_n_m_keeps_the_largest_of_every_group() -> None:
    score = torch.tensor([[1.0, 5, 9, 2, 3, 3, 3, 3], [7, 1, 1, 8, 0, 0, 4, 4]])
    assert masks.n_m(score, 2, 4).int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 1, 0, 0, 1, 1]]
    assert masks.n_m(score, 1, 2).int().tolist() == [[0, 1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("ratio", RATIOS)
def test_global_counts_equal_a_plain_sort(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(30, 7, generator=generator).abs(), torch.randint(0, 3, (50,), generator=generator).float() / 2]
    tensors += [torch.zeros(4, 4), torch.rand(100, generator=generator) * 1e-20]
    count = dropped_count(sum(tensor.numel() for tensor in tensors), ratio)
    flat = [(value, index) for index, tensor in enumerate(tensors) for value in tensor.flatten().tolist()]
    dropped = sorted(flat)[:count]  # of equal values those of the earlier tensor first
    assert masks.global_counts(lambda: tensors, count) == [sum(index == i for _, index in dropped) for i in range(4)]


def test_sensitivity_counts_add_up_and_lie_halfway() -> None:
    assert sensitivity_counts([100, 0], [100, 100], 0.5) == [75, 25]
    assert sensitivity_counts([3, 8, 0], [7, 11, 4], 0.5) == [3, 7, 1]


@pytest.mark.parametrize("ratios", [(0.5, 0.2), (0.2, 0.5)])
def test_a_layer_of_two_stages_shows_the_larger_ratio(ratios: tuple[float, float]) -> None:
    """The finished plan said what the last stage asked, 0.2 of a layer that had lost half."""
    recipe = rules(*({"method": "magnitude", "ratio": ratio, "roles": ["up"]} for ratio in ratios))
    model = small_text_model()
    expected = plan(model, recipe)
    assert {row.ratio for row in pipeline.compress(model, recipe).rows if row.role == "up"} == {0.5}
    assert {row.ratio for row in expected.rows if row.role == "up"} == {0.5}


def naive_obs(weight: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """SparseGPT's update by the book: at each column the inverse Hessian of the columns from it on."""
    weight = weight.clone().double()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian.double()[column:, column:])
        error = torch.where(keep[:, column], 0.0, weight[:, column]) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    return weight


def test_sparsegpt_is_obs_by_the_book() -> None:
    _, given = problem()
    weight = random_weight()
    ahead = [torch.linalg.inv(given.hessian.double()[column:, column:])[0, 0] for column in range(12)]
    keep = masks.per_layer((weight.double().square() / torch.stack(ahead)).float(), 42)
    result = sparsegpt(weight, given, "per_layer", 42)
    assert torch.equal(result != 0, keep)
    torch.testing.assert_close(result, naive_obs(weight, given.hessian, keep).float(), rtol=1e-3, atol=1e-4)


def test_sparsegpt_n_m_is_obs_with_each_groups_own_mask() -> None:
    _, given = problem()
    result = sparsegpt(random_weight(), given, (2, 4), 0)
    assert ((result != 0).reshape(7, 3, 4).sum(dim=2) == 2).all()
    expected = naive_obs(random_weight(), given.hessian, result != 0)
    torch.testing.assert_close(result, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("columns", [96, 300])  # one block, and three
def test_sparsegpt_counts_are_exact(ratio: float, columns: int) -> None:
    _, given = problem(columns, 400)
    weight = random_weight(20, columns)
    count, in_row = dropped_count(weight.numel(), ratio), dropped_count(columns, ratio)
    assert int((sparsegpt(weight, given, "per_layer", count) == 0).sum()) == count
    assert ((sparsegpt(weight, given, "per_row", in_row) == 0).sum(dim=1) == in_row).all()


@pytest.mark.parametrize("pattern", ["per_layer", "per_row", (2, 4)])
def test_sparsegpt_counts_earlier_zeros_and_keeps_them(pattern: str | tuple[int, int]) -> None:
    _, given = problem(300, 400)
    weight = random_weight(20, 300)
    zero = masks.n_m(weight.abs(), 3, 4).logical_not()
    result = sparsegpt(weight.masked_fill(zero, 0), given, pattern, 3000 if pattern == "per_layer" else 150)
    assert (result[zero] == 0).all()
    assert int((result == 0).sum()) == 3000


def test_sparsegpt_beats_wanda_and_magnitude_on_its_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 64, generator=generator) @ (torch.eye(64) + 0.2 * torch.randn(64, 64, generator=generator))
    weight, given = random_weight(32, 64), quadratic.damped(x.T @ x / 2000, 0.01)

    def error(other: Tensor) -> float:
        return float((x @ (other - weight).T).square().mean())

    ours = error(sparsegpt(weight, given, "per_row", 32))
    wanda = error(weight * masks.per_row(scores.wanda(weight, x.norm(dim=0)), 32))
    assert ours < 0.8 * wanda < wanda < error(weight * masks.per_row(weight.abs(), 32))


def test_row_weights_move_the_loss_to_rows_that_matter_less() -> None:
    _, given = problem()
    row_weight = torch.tensor([100.0] + [1.0] * 6)
    result = sparsegpt(random_weight(), given, "per_layer", 42, row_weight)
    assert int((result[0] == 0).sum()) < int((sparsegpt(random_weight(), given, "per_layer", 42)[0] == 0).sum())


def pruned_by_admm(weight: Tensor, given: quadratic.Quadratic, pattern: str, count: int = 0) -> Tensor:
    """Forty steps and the exact fit of what is kept."""
    found = admm(weight, given, lambda score: masks.of_pattern(score, pattern, count), 40)
    return quadratic.refine(found, found != 0, weight, given.hessian, 40)


def errors(weight: Tensor, wanted: Tensor, hessian: Tensor) -> Tensor:
    """[rows]: what each row of `weight` costs."""
    change = (weight - wanted).double()
    return ((change @ hessian.double()) * change).sum(dim=1)


def test_admm_comes_closer_to_the_best_of_all_masks_than_sparsegpt() -> None:
    """Each row of 12 inputs has 216 masks of two in four."""
    _, given = problem()
    weight, hessian = random_weight(40), given.hessian.double()
    groups = [[start + one, start + other] for start in (0, 4, 8) for one, other in combinations(range(4), 2)]
    least = torch.full((40,), torch.inf, dtype=torch.float64)
    for chosen in product(groups[:6], groups[6:12], groups[12:]):
        kept = [column for pair in chosen for column in pair]
        fit = torch.zeros(40, 12, dtype=torch.float64)
        fit[:, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.double().T).T
        least = least.minimum(errors(fit, weight, hessian))
    greedy = sparsegpt(weight, given, (2, 4), 0)
    greedy = quadratic.refine(greedy, greedy != 0, weight, given.hessian, 40)
    ours, theirs = (
        float((errors(found, weight, hessian) / least).log().mean()) for found in (pruned_by_admm(weight, given, "2:4"), greedy)
    )
    assert 0 <= ours < 0.5 * theirs


def test_admm_takes_from_rows_that_matter_less() -> None:
    _, given = problem()
    row_weight = torch.tensor([100.0] + [1.0] * 6)
    zeros = [
        int((admm(random_weight(), given, lambda score: masks.per_layer(score, 42), 40, weight)[0] == 0).sum())
        for weight in (row_weight, None)
    ]
    assert zeros[0] < zeros[1]


@pytest.mark.parametrize("ratio", RATIOS)
def test_admm_counts_are_exact_and_earlier_zeros_among_them(ratio: float) -> None:
    _, given = problem(96, 400)
    weight = random_weight(20, 96)
    zero = torch.rand(20, 96, generator=torch.Generator().manual_seed(4)) < ratio / 2
    weight = weight.masked_fill(zero, 0)
    count, in_row = dropped_count(weight.numel(), ratio), max(dropped_count(96, ratio), int(zero.sum(dim=1).max()))
    by_layer, by_row = pruned_by_admm(weight, given, "per_layer", count), pruned_by_admm(weight, given, "per_row", in_row)
    assert int((by_layer == 0).sum()) == count
    assert ((by_row == 0).sum(dim=1) == in_row).all()
    assert not by_layer[zero].any()
    assert not by_row[zero].any()


def test_refine_reaches_the_least_squares_of_the_kept_weights() -> None:
    _, given = problem()
    weight, keep = random_weight(), masks.per_layer(random_weight().flip(0).abs(), 42)
    result = quadratic.refine(weight * keep, keep, weight, given.hessian, 40)
    for row in range(7):
        kept = keep[row]
        hessian = given.hessian.double()
        best = torch.linalg.solve(hessian[kept][:, kept], (hessian @ weight[row].double())[kept])
        torch.testing.assert_close(result[row][kept], best.float(), rtol=1e-3, atol=1e-3)
    assert (result[~keep] == 0).all()


def test_the_target_fits_the_dense_output_from_the_inputs_there_are() -> None:
    x, _ = problem()
    dense = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    hessian, cross, weight = x.T @ x / len(x), dense.T @ x / len(x), random_weight()
    given = quadratic.damped(hessian, 0.01)
    own = Moments(hessian.diagonal(), hessian, None, len(x))
    assert torch.equal(quadratic.target(weight, own, given), weight)
    fitted = quadratic.target(weight, Moments(hessian.diagonal(), hessian, cross, len(x)), given)
    ridge = (0.01 * hessian.diagonal().mean() * len(x)).sqrt() * torch.eye(12)
    left, right = torch.cat([x, ridge]), torch.cat([dense, ridge]) @ weight.T
    expected = torch.linalg.lstsq(left.double(), right.double()).solution.T
    torch.testing.assert_close(fitted, expected.float(), rtol=1e-3, atol=1e-3)


def test_a_broken_hessian_is_named_and_unused_inputs_are_not_broken() -> None:
    with pytest.raises(WeightsError, match=r"E3004 .*raise `damping`"):
        quadratic.damped(torch.tensor([[1.0, 4.0], [4.0, 1.0]]), 0.01)
    assert quadratic.damped(torch.zeros(3, 3), 0.01).hessian.diagonal().tolist() == [1, 1, 1]


def least_error(down: Tensor, hessian: Tensor, kept: list[int]) -> float:
    fit = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ down.T).T
    rest = down.clone()
    rest[:, kept] -= fit
    return float(torch.trace(rest @ hessian @ rest.T))


def test_channels_are_chosen_as_a_brute_force_greedy_does() -> None:
    _, given = problem()
    down, hessian = random_weight().double(), given.hessian.double()
    kept = list(range(12))
    for _ in range(5):
        worst = min(kept, key=lambda channel: least_error(down, hessian, [other for other in kept if other != channel]))
        kept.remove(worst)
    assert structured.choose_channels(random_weight(), given, 7).tolist() == kept


def test_refit_is_the_least_squares_of_the_kept_columns() -> None:
    x, given = problem(damping=1e-6)
    kept = torch.tensor([0, 3, 4, 7, 11])
    expected = torch.linalg.lstsq(x[:, kept].double(), (x @ random_weight().T).double()).solution.T
    torch.testing.assert_close(structured.refit(random_weight(), given, kept), expected.float(), rtol=1e-3, atol=1e-3)


# Stages on a model


@pytest.mark.parametrize("pattern", ["per_row", "per_layer", "2:4"])
def test_wanda_equals_a_plain_loop(pattern: str) -> None:
    model, dense = pruned(WANDA | {"pattern": pattern, "order": "one_shot"}), small_text_model()
    for name in linears(dense):
        weight = weight_of(dense, name)
        score = weight.abs() * plain_inputs(dense, samples(), name).norm(dim=0)
        groups = {"per_row": score, "per_layer": score.reshape(1, -1), "2:4": score.reshape(-1, 4)}[pattern]
        keep = torch.ones_like(groups, dtype=torch.bool)
        keep.scatter_(1, groups.argsort(dim=1, stable=True)[:, : groups.shape[1] // 2], value=False)
        assert torch.equal(weight_of(model, name), weight * keep.reshape(weight.shape))


def test_sequential_wanda_measures_behind_pruned_linears() -> None:
    model, dense = pruned(WANDA), small_text_model()
    name = "model.layers.1.mlp.down_proj"
    weight = weight_of(dense, name)
    score = weight.abs() * plain_inputs(model, samples(), name).norm(dim=0)  # its inputs come from what is pruned
    assert torch.equal(weight_of(model, name), weight * masks.per_row(score, 24))


@pytest.mark.parametrize(
    "stage",
    [
        WANDA,
        WANDA | {"pattern": "2:4"},
        SPARSEGPT,
        SPARSEGPT | {"pattern": "per_row", "order": "one_shot"},
        SPARSEGPT | {"pattern": "2:4", "match": "dense"},
        SPARSEGPT | {"match": "dense", "refine": 10},
        ADMM,
        ADMM | {"pattern": "per_row", "order": "one_shot", "refine": 0},
        ADMM | {"pattern": "2:4", "match": "dense"},
        ADMM | {"pattern": "2:4", "block_epochs": 2},
        SPARSEGPT | {"order": "one_shot", "block_epochs": 1},
    ],
    ids=str,
)
def test_the_ratio_is_exact_in_every_layer(stage: dict[str, object]) -> None:
    model = small_text_model()
    recipe = rules(stage)
    results = sparsify_(model, recipe.sparsity[0], plan(model, recipe), data=CalibrationData(samples(), Store()))
    assert len(results) == 14
    assert all(result.zeros == result.dropped == result.weights // 2 for result in results.values())


@pytest.mark.parametrize("stage", [WANDA | {"pattern": "per_layer"}, SPARSEGPT, ADMM], ids=lambda stage: stage["method"])
def test_an_allocated_ratio_is_exact_over_all_layers(stage: dict[str, object]) -> None:
    model = small_text_model()
    recipe = rules(stage | {"allocation": "sensitivity", "ratio": 0.3})
    results = sparsify_(model, recipe.sparsity[0], plan(model, recipe), data=CalibrationData(samples(), Store()))
    total = sum(result.weights for result in results.values())
    assert sum(result.zeros for result in results.values()) == dropped_count(total, 0.3)
    assert len({result.asked for result in results.values()}) > 5


def output_error(model: nn.Module) -> float:
    dense = small_text_model()
    with torch.no_grad():
        pairs = [(model(sample.token_ids).logits, dense(sample.token_ids).logits) for sample in samples()]
    return float(sum((one - other).square().mean() for one, other in pairs))


def test_each_lever_helps_on_the_calibration_data() -> None:
    magnitude, wanda, plain = (
        output_error(pruned(stage)) for stage in ({"method": "magnitude", "ratio": 0.5}, WANDA, SPARSEGPT)
    )
    refined = output_error(pruned(SPARSEGPT | {"refine": 20}))
    dense = output_error(pruned(SPARSEGPT | {"refine": 20, "match": "dense"}))
    assert dense < refined < plain < min(wanda, magnitude)
    assert output_error(pruned(ADMM)) < refined


@pytest.mark.parametrize("stage", [SPARSEGPT, ADMM | {"pattern": "2:4"}, COMPACT], ids=str)
def test_layers_learn_to_give_what_they_gave(stage: dict[str, object]) -> None:
    without, fitted = (output_error(pruned(stage | {"block_epochs": epochs})) for epochs in (0, 60))
    assert fitted < 0.9 * without


def test_block_fitting_keeps_zeros_and_never_does_harm() -> None:
    model = small_text_model()
    block = next(walk_layers(model, samples()))
    names = [name for name in linears(model) if name.startswith(f"{block.name}.")]
    dense = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in names}
    wanted = blockwise.outputs(block, dense)
    assert blockwise.fit_block(block, dense, wanted, 2) == dense  # nothing to gain
    sparse = {name: weight * (weight.abs() > weight.abs().median()) for name, weight in dense.items()}
    fitted = blockwise.fit_block(block, sparse, wanted, 5)
    for name, weight in fitted.items():
        assert torch.equal(weight == 0, sparse[name] == 0)
        assert torch.equal(model.get_parameter(f"{name}.weight"), dense[name])  # the model itself is left alone
    before, after = (
        sum(float((one - two).square().sum()) for one, two in zip(blockwise.outputs(block, weights), wanted, strict=True))
        for weights in (sparse, fitted)
    )
    assert after < before


def test_block_fitting_of_a_bfloat16_model_works_in_float32() -> None:
    model = small_text_model().bfloat16()
    block = next(walk_layers(model, samples()))
    names = [name for name in linears(model) if name.startswith(f"{block.name}.")]
    dense = {name: model.get_parameter(f"{name}.weight").detach().float() for name in names}
    wanted = blockwise.outputs(block, dense)
    assert {output.dtype for output in wanted} == {torch.float32}
    sparse = {name: weight * (weight.abs() > weight.abs().median()) for name, weight in dense.items()}
    fitted = blockwise.fit_block(block, sparse, wanted, 5)
    assert {weight.dtype for weight in fitted.values()} == {torch.float32}
    moved = [name for name in names if not torch.equal(fitted[name], sparse[name])]
    assert moved == names


def test_compact_takes_channels_out_of_gate_up_and_down_together() -> None:
    model, dense = pruned(COMPACT | {"compensate": False, "order": "one_shot"}), small_text_model()
    assert model.config.intermediate_size == 36
    for layer in (0, 1):
        mlp, old = (cast(Gemma3MLP, owner.get_submodule(f"model.layers.{layer}.mlp")) for owner in (model, dense))
        score = scores.channel(
            old.down_proj.weight, plain_inputs(dense, samples(), f"model.layers.{layer}.mlp.down_proj").norm(dim=0)
        )
        kept = score.argsort(stable=True)[12:].sort().values
        assert torch.equal(mlp.gate_proj.weight, old.gate_proj.weight[kept])
        assert torch.equal(mlp.up_proj.weight, old.up_proj.weight[kept])
        assert torch.equal(mlp.down_proj.weight, old.down_proj.weight[:, kept])
        assert (mlp.down_proj.in_features, mlp.gate_proj.out_features) == (36, 36)


def test_compensation_helps() -> None:
    plain, refitted = (output_error(pruned(COMPACT | {"compensate": flag})) for flag in (False, True))
    assert refitted < plain


@pytest.mark.parametrize(("multiple", "kept"), [(1, 36), (4, 36), (8, 32), (16, 32), (32, 32)])
def test_kept_channels_are_rounded_to_the_nearest_multiple(multiple: int, kept: int) -> None:
    stages = plan_stages(small_text_model(), rules(COMPACT | {"multiple": multiple}))
    assert stages[-1]["model.layers.0.mlp.down_proj"].shape == (32, kept)


def test_a_compact_plan_has_the_final_shapes_and_bytes() -> None:
    tree = rules(COMPACT | {"multiple": 64}).model_dump(mode="json", exclude_none=True)
    tree |= {"model": {"base": "small-gemma3"}, "quantization": {"default": "int8"}}
    drawn = plan(gemma_4b(), Recipe.from_tree(tree, "test"))
    up, down = (drawn[f"model.language_model.layers.0.mlp.{name}_proj"] for name in ("up", "down"))
    assert (up.shape, down.shape) == ((7680, 2560), (2560, 7680))
    assert up.bytes == 7680 * 2560 + 4 * 7680
    assert drawn.parameters == 4_300_079_472 - 34 * 3 * 2560 * 2560


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        (COMPACT | {"multiple": 64}, "would keep 64 of 48 channels"),
        (SPARSEGPT | {"pattern": "5:10"}, "do not divide into groups of 10"),
        (WANDA | {"ratio": 0.01}, "would drop 0 of 32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_the_plan(stage: dict[str, object], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        plan(small_text_model(), rules(stage))


def test_stages_follow_each_other() -> None:
    model = pruned(COMPACT, SPARSEGPT | {"pattern": "2:4"}, {"method": "magnitude", "ratio": 0.6})
    down = weight_of(model, "model.layers.1.mlp.down_proj")
    assert down.shape == (32, 36)
    assert int(torch.count_nonzero(down == 0)) == dropped_count(32 * 36, 0.6)


# A kill in the middle


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    "stage",
    [
        SPARSEGPT | {"match": "dense", "allocation": "sensitivity"},
        SPARSEGPT | {"order": "one_shot"},
        WANDA,
        ADMM,
        ADMM | {"block_epochs": 2},
        COMPACT | {"match": "dense"},
        COMPACT | {"block_epochs": 2, "order": "one_shot"},
    ],
    ids=str,
)
def test_a_build_goes_on_after_a_kill_with_the_same_result(stage: dict[str, object], tmp_path: Path) -> None:
    whole = pruned(stage)
    calls: list[int] = []

    def kill(title: str, done: int, total: int) -> None:
        calls.append(done)
        raise Killed

    model = small_text_model()
    with pytest.raises(Killed):
        pipeline.compress(model, rules(stage), kill, CalibrationData(samples(), Store(tmp_path / "work", {"x": 1})))
    kept = sorted(path.name for path in (tmp_path / "work").glob("1.*.model.layers.*"))
    assert [name.split(".layers.")[1] for name in kept] == ["0.safetensors"]
    stamp = (tmp_path / "work" / kept[0]).stat().st_mtime_ns
    resumed = pruned(stage, store=Store(tmp_path / "work", {"x": 1}))
    assert (tmp_path / "work" / kept[0]).stat().st_mtime_ns == stamp
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


# Whole builds


def test_data_is_needed_and_never_measured_in_setup() -> None:
    recipe = Recipe.load("small-int8-compact25")
    for attempt in (
        lambda: loading.open_model(loading.Source(recipe), "cpu"),
        lambda: pipeline.compress(small_text_model(), rules(WANDA)),
    ):
        with pytest.raises(NeedsBuild, match=r"E2011 .*python -m gemma_opt compress"):
            attempt()


def test_a_compact_checkpoint_is_the_model_that_was_saved(tmp_path: Path) -> None:
    recipe = Recipe.load("small-int8-compact25", ("calibration.windows=4", "quantization.default=int8"))
    model, assert_calibration = fresh_model(), recipe.calibration
    assert assert_calibration is not None
    data = CalibrationData(draw_samples(assert_calibration, processing()), Store())
    layers = inspection.measure(model, pipeline.compress(model, recipe, data=data))
    with staging(tmp_path / "out", 0) as folder:
        checkpoint.write(folder, model, processing(), recipe, layers, {"name": "small-gemma3"})
    loaded = checkpoint.load(tmp_path / "out", torch.device("cpu"))
    width = loaded.model.config.get_text_config().intermediate_size
    assert width == model.config.get_text_config().intermediate_size < 768
    assert loaded.plan.bytes == sum(tensor.nbytes for tensor in checkpoint.stored_tensors(loaded.model, loaded.plan).values())
    prompt = PromptEncoder(processing(), 512).encode(single_turn("Which bar is tallest?", "", [chart()]))
    with torch.inference_mode():
        one, other = (item(**oracle_inputs(item, prompt)).logits for item in (model, loaded.model))
    assert torch.equal(one, other)


@pytest.mark.slow
def test_a_build_reports_its_data_and_leaves_no_work_behind(tmp_path: Path) -> None:
    recipe = Recipe.load("small-int8-compact25", ("calibration.windows=8",))
    report = build(recipe, tmp_path / "out", questions=9, device="cpu")
    assert report.base_bytes == 2 * 5_089_968  # of the model before its channels left
    assert gemma.read_config(tmp_path / "out").get_text_config().intermediate_size == 576
    assert report.quality is not None
    manifest = checkpoint.read_manifest(tmp_path / "out")
    assert manifest.base["calibration"] == {"charts": "charts"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
