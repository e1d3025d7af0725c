"""Exact masks, schedules and shares, and the walk over a model. Oracle for masks: a plain sort by (score, index)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from gemma_opt.errors import PlanError
from gemma_opt.policy import dropped_count, plan, planned_weights, quiet
from gemma_opt.recipe import Magnitude, Schedule
from gemma_opt.sparsity import LayerSparsity, masks, scores, sparsify_
from gemma_opt.sparsity.allocation import MAX_SHARE, layer_norm_counts, layer_norm_shares
from gemma_opt.sparsity.apply import _Drop, _prune_, _Run
from gemma_opt.sparsity.schedule import ratio_after
from tests.shapes import recipe, small_text_model

Weights = dict[str, Tensor]
RATIOS = [0.01, 0.1, 0.25, 0.3, 0.5, 0.77, 0.8]
TEXT_LINEARS = 14  # of small_text_model


def naive_keep(values: list[float], count: int) -> list[bool]:
    """Drop the `count` smallest by (value, index)."""
    dropped = set(sorted(range(len(values)), key=lambda index: (values[index], index))[:count])
    return [index not in dropped for index in range(len(values))]


def score_cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "normal": torch.randn(37, 23, generator=generator).abs(),
        "integers": torch.randint(0, 4, (40, 16), generator=generator).float(),
        "equal": torch.full((12, 25), 0.5),
        "zeros": torch.zeros(9, 11),
        "bf16": torch.randn(32, 48, generator=generator).bfloat16().float().abs(),
        "transposed": torch.randint(0, 3, (16, 40), generator=generator).float().T,
    }


def run(*stages: Mapping[str, object], seed: int = 0) -> tuple[Weights, Weights, list[dict[str, LayerSparsity]]]:
    """All parameters before and after the stages, and each stage's results."""
    model = small_text_model(seed)
    drawn = plan(model, recipe(*stages))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    results = [sparsify_(model, stage, drawn) for stage in recipe(*stages).sparsity]
    return before, {name: parameter.detach() for name, parameter in model.named_parameters()}, results


# Scores and masks


def test_scores_on_a_small_matrix() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert scores.magnitude(weight.bfloat16()).tolist() == [[3, 4], [0, 1]]
    assert scores.magnitude(weight.bfloat16()).dtype == torch.float32
    assert scores.row_norm(weight).tolist() == [5, 1]
    assert scores.rms(weight) == (26 / 4) ** 0.5


def test_masks_on_a_4x4() -> None:
    score = torch.tensor([[1.0, 5, 9, 2], [7, 1, 1, 8], [3, 3, 3, 3], [6, 4, 0, 1]])
    assert masks.per_layer(score, 4).int().tolist() == [[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1]]
    assert masks.per_row(score, 2).int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]]
    assert masks.rows(score.sum(dim=1), 2).int().tolist() == [[1], [1], [0], [0]]


@pytest.mark.parametrize("name", list(score_cases()))
@pytest.mark.parametrize("ratio", RATIOS)
def test_masks_equal_a_plain_sort(name: str, ratio: float) -> None:
    score = score_cases()[name]
    count = dropped_count(score.numel(), ratio)
    keep = masks.per_layer(score, count)
    assert keep.flatten().tolist() == naive_keep(score.flatten().tolist(), count)
    in_row = dropped_count(score.shape[1], ratio)
    assert masks.per_row(score, in_row).tolist() == [naive_keep(row, in_row) for row in score.tolist()]
    in_rows = dropped_count(score.shape[0], ratio)
    norms = scores.row_norm(score)
    assert masks.rows(norms, in_rows).flatten().tolist() == naive_keep(norms.tolist(), in_rows)


def test_masks_at_both_ends() -> None:
    score = torch.ones(3, 4)
    assert masks.per_layer(score, 0).all()
    assert not masks.per_layer(score, 12).any()
    assert not masks.per_row(score, 4).any()


# Schedules


@pytest.mark.parametrize(("kind", "expected"), [("linear", [0.2, 0.4, 0.6, 0.8]), ("cubic", [0.4625, 0.7, 0.7875, 0.8])])
def test_schedule(kind: str, expected: list[float]) -> None:
    schedule = Schedule.model_validate({"kind": kind, "steps": 4})
    assert [ratio_after(step, 0.8, schedule) for step in range(1, 5)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("steps", [1, 3, 7, 10, 49, 1000])
def test_schedule_grows_and_ends_exactly(kind: str, steps: int) -> None:
    schedule = Schedule.model_validate({"kind": kind, "steps": steps})
    for ratio in RATIOS:
        ratios = [ratio_after(step, ratio, schedule) for step in range(1, steps + 1)]
        assert ratios == sorted(ratios)
        assert ratios[-1] == ratio


# Shares of layer_norm


@pytest.mark.parametrize(
    ("rms", "sizes", "ratio", "counts"),
    [
        pytest.param([2, 4], [100, 100], 0.3, [40, 20], id="in inverse proportion"),  # 0.45 and 0.225, scaled by 8/9
        pytest.param([2, 4], [100, 400], 0.3, [50, 100], id="sizes weigh"),  # 45 + 90 = 135, scaled by 150/135 to 50 + 100
        pytest.param([1, 2, 4], [100] * 3, 0.5, [95, 37, 18], id="clipped"),  # 7/6 is cut; 55 left, 2 : 1
        pytest.param([0, 1, 2], [10, 100, 100], 0.75, [10, 95, 53], id="lifted above the limit"),  # 9.5, 98.7 cut to 95, 53
        pytest.param([0, 1, 1], [100] * 3, 0.5, [95, 28, 27], id="zeros and a tied remainder"),
        pytest.param([0, 1, 1], [100] * 3, 0.2, [60, 0, 0], id="zeros alone suffice"),
        pytest.param([0, 0], [10, 30], 0.5, [5, 15], id="all zeros"),
        pytest.param([3], [7], 0.5, [4], id="one layer"),
    ],
)
def test_layer_norm_counts_by_hand(rms: list[float], sizes: list[int], ratio: float, counts: list[int]) -> None:
    assert layer_norm_counts(rms, sizes, ratio) == counts


@pytest.mark.parametrize("ratio", RATIOS)
def test_layer_norm_counts_add_up_exactly(ratio: float) -> None:
    generator = torch.Generator().manual_seed(int(ratio * 100))
    rms = [float(value) for value in torch.rand(238, generator=generator).pow(3) * 0.05]
    sizes = [2_621_440, 5_242_880, 26_214_400, 26_214_399, 101, 33, 7] * 34
    counts = layer_norm_counts(rms, sizes, ratio)
    shares = layer_norm_shares(rms, sizes, ratio)
    assert sum(counts) == dropped_count(sum(sizes), ratio)
    assert all(0 <= share <= MAX_SHARE for share in shares)
    assert all(abs(count - share * size) < 1 for count, share, size in zip(counts, shares, sizes, strict=True))
    by_rms = [share for _, share in sorted(zip(rms, shares, strict=True))]
    assert by_rms == sorted(by_rms, reverse=True)


# The walk over a model


@pytest.mark.parametrize(
    ("pattern", "ratio"),
    [("per_layer", ratio) for ratio in RATIOS] + [("per_row", ratio) for ratio in RATIOS if ratio > 0.02],  # of 32 columns
)
def test_magnitude_drops_the_exact_share_of_every_planned_layer_and_nothing_else(pattern: str, ratio: float) -> None:
    before, after, (results,) = run({"method": "magnitude", "ratio": ratio, "pattern": pattern})
    assert len(results) == TEXT_LINEARS
    for name, old in before.items():
        new, result = after[name], results.get(name.removesuffix(".weight"))
        if result is None:
            assert torch.equal(new, old)
            continue
        rows = [old.abs().flatten().tolist()] if pattern == "per_layer" else old.abs().tolist()
        keep = torch.tensor([naive_keep(row, dropped_count(len(row), ratio)) for row in rows]).reshape(old.shape)
        assert torch.equal(new, old * keep)
        zeros = int((~keep).sum())
        assert result == LayerSparsity(asked=ratio, dropped=zeros, zeros=zeros, weights=old.numel())
        assert result.measured == zeros / old.numel()


def test_magnitude_over_the_whole_model_equals_one_plain_sort() -> None:
    before, after, (results,) = run({"method": "magnitude", "ratio": 0.3, "pattern": "global"})
    old = torch.cat([before[f"{name}.weight"].flatten() for name in results])
    keep = torch.tensor(naive_keep(old.abs().tolist(), dropped_count(old.numel(), 0.3)))
    assert torch.equal(torch.cat([after[f"{name}.weight"].flatten() for name in results]), old * keep)
    assert all(result.asked == result.dropped / result.weights for result in results.values())


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5)])
def test_magnitude_keeps_the_largest_n_of_every_m(pattern: str, ratio: float) -> None:
    before, after, (results,) = run({"method": "magnitude", "ratio": ratio, "pattern": pattern})
    keep_count, group = map(int, pattern.split(":"))
    for name in results:
        old = before[f"{name}.weight"].reshape(-1, group)
        keep = torch.tensor([naive_keep(row, group - keep_count) for row in old.abs().tolist()])
        assert torch.equal(after[f"{name}.weight"], (old * keep).reshape(after[f"{name}.weight"].shape))


@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("pattern", ["per_layer", "per_row"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_gradual_without_training_is_one_shot(kind: str, pattern: str, steps: int) -> None:
    shot = {"ratio": 0.3, "pattern": pattern}
    _, once, (result,) = run(shot | {"method": "magnitude"})
    _, slow, (gradual,) = run(shot | {"method": "gradual", "schedule": {"kind": kind, "steps": steps}})
    assert all(torch.equal(once[name], slow[name]) for name in once)
    assert result == gradual


def test_gradual_steps_and_masks_only_grow() -> None:
    """A trainer that revives every weight between the steps: what fell before stays fallen, and each step's count is exact."""
    model = small_text_model()
    text = {"method": "gradual", "ratio": 0.5, "schedule": {"kind": "cubic", "steps": 4}}
    rules = recipe(text)
    drawn, stage = plan(model, rules), rules.sparsity[0]
    weights = planned_weights(model, drawn.prunable(stage))
    fallen = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    seen: list[int] = []

    def train(step: int) -> None:
        assert torch.is_grad_enabled()
        seen.append(step)
        for name, weight in weights.items():
            zero = weight.detach() == 0
            assert int(zero.sum()) == dropped_count(weight.numel(), 0.5 * (1 - (1 - step / 4) ** 3))
            assert (zero | ~fallen[name]).all()
            fallen[name] = zero
            weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))

    calls: list[tuple[int, int]] = []
    results = sparsify_(model, stage, drawn, lambda done, total, _: calls.append((done, total)), train)
    assert seen == [1, 2, 3]
    assert calls == [(done, 4 * TEXT_LINEARS) for done in range(1, 4 * TEXT_LINEARS + 1)]
    for name, weight in weights.items():
        assert (weight.detach()[fallen[name]] == 0).all()
        assert results[name].zeros == results[name].dropped == weight.numel() // 2


def test_layer_norm_meets_the_ratio_over_all_layers() -> None:
    before, after, (results,) = run({"method": "layer_norm", "ratio": 0.3})
    sizes = [result.weights for result in results.values()]
    assert sum(result.zeros for result in results.values()) == dropped_count(sum(sizes), 0.3)
    rms = [float(before[f"{name}.weight"].double().square().mean().sqrt()) for name in results]
    assert [result.dropped for result in results.values()] == layer_norm_counts(rms, sizes, 0.3)
    for name, result in results.items():
        old = before[f"{name}.weight"]
        keep = torch.tensor(naive_keep(old.abs().flatten().tolist(), result.dropped)).reshape(old.shape)
        assert torch.equal(after[f"{name}.weight"], old * keep)
        assert result.asked == result.dropped / result.weights


def test_layer_norm_takes_a_layer_of_zeros_first() -> None:
    model = small_text_model()
    rules = recipe({"method": "layer_norm", "ratio": 0.05})
    empty = "model.layers.0.mlp.up_proj"
    planned_weights(model, plan(model, rules).rows)[empty].data.zero_()
    results = sparsify_(model, rules.sparsity[0], plan(model, rules))
    total = sum(result.weights for result in results.values())
    assert results[empty].dropped == dropped_count(total, 0.05) < results[empty].weights
    assert results[empty].measured == 1
    assert all(result.zeros == 0 for name, result in results.items() if name != empty)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_rows_zeroes_whole_rows_of_smallest_norm(ratio: float) -> None:
    before, after, (results,) = run({"method": "rows", "ratio": ratio, "roles": ["up", "key"]})
    assert len(results) == 4
    for name, result in results.items():
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        norms = [sum(value * value for value in row) ** 0.5 for row in old.double().tolist()]
        keep = torch.tensor(naive_keep(norms, dropped_count(len(norms), ratio)))[:, None]
        assert new.shape == old.shape
        assert torch.equal(new, old * keep)
        assert result.dropped == result.zeros == dropped_count(old.shape[0], ratio) * old.shape[1]


def test_a_second_stage_counts_the_zeros_of_the_first() -> None:
    first, second = ({"method": "magnitude", "ratio": ratio} for ratio in (0.3, 0.5))
    _, at_once, _ = run(second)
    _, grown, (_, results) = run(first, second)
    assert all(torch.equal(at_once[name], grown[name]) for name in at_once)
    assert all(result.zeros == result.dropped == dropped_count(result.weights, 0.5) for result in results.values())
    _, shrunk, (_, results) = run(second, first)
    assert all(torch.equal(at_once[name], shrunk[name]) for name in at_once)
    for result in results.values():
        assert (result.dropped, result.zeros) == (dropped_count(result.weights, 0.3), dropped_count(result.weights, 0.5))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(["magnitude", "rows", "layer_norm"], 2)))
def test_stages_of_unlike_methods_keep_each_others_zeros(first: str, second: str) -> None:
    _, once, _ = run({"method": first, "ratio": 0.25})
    _, twice, (_, results) = run({"method": first, "ratio": 0.25}, {"method": second, "ratio": 0.5})
    for name in results:
        zero_once, zero_twice = once[f"{name}.weight"] == 0, twice[f"{name}.weight"] == 0
        assert (zero_twice | ~zero_once).all()
        assert int(zero_twice.sum()) >= results[name].dropped


def test_bf16_weights_with_many_ties() -> None:
    model = small_text_model().bfloat16()
    rules = recipe({"method": "magnitude", "ratio": 0.5})
    results = sparsify_(model, rules.sparsity[0], plan(model, rules))
    assert all(result.zeros == result.weights // 2 for result in results.values())


class Lazy(Magnitude):
    """A method that a later version might add."""


@_prune_.register
def _(stage: Lazy, run: _Run) -> dict[str, _Drop]:
    """Forgets the first layer, and says that it zeroed 16 weights of every other one."""
    return {name: _Drop(stage.ratio, 16) for name in list(run.weights)[1:]}


def test_a_stage_that_does_less_than_planned_is_an_error() -> None:
    model = small_text_model()
    with pytest.raises(PlanError) as caught:
        sparsify_(model, Lazy(method="magnitude", ratio=0.5), plan(model, recipe()))
    assert "model.layers.0.self_attn.q_proj: planned or touched, not both" in str(caught.value)
    assert str(caught.value).count("16 weights were to fall, 0 are zero") == TEXT_LINEARS - 1


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="Recipe"):
        _prune_(recipe(), _Run({}, quiet, None))
