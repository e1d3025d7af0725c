"""The sampler: transformers' own filters are the oracle, statistics the judge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from gemma_opt.engine.batch import LEVEL_ROUTES, Batch, Level, level_of, step, step_apart
from gemma_opt.engine.interface import LIMITS, SamplingParams
from gemma_opt.engine.sampling import (
    WIDE,
    Route,
    SamplingRows,
    _race_of_few,  # pyright: ignore[reportPrivateUsage]
    best,
    best_tokens,
    exponential_noise,
    mix64,
    next_tokens,
    next_tokens_apart,
    nucleus_threshold,
    penalize_repetition,
    route_of,
)
from gemma_opt.errors import ParameterError

CPU = torch.device("cpu")
COLUMNS = 20_011  # no multiple of anything
OFF: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
KINDS = {
    Route.GREEDY: SamplingParams(temperature=0, seed=1),
    Route.NARROW: SamplingParams(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=2),
    Route.WIDE: SamplingParams(temperature=1.3, top_k=700, top_p=0.95, seed=3),
    Route.WHOLE: SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.001, seed=4),
    Route.NUCLEUS: SamplingParams(temperature=0.7, top_k=0, top_p=0.8, seed=5),
}


def logits_of(seed: int, size: int = COLUMNS, spread: float = 3.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def draws(logits: Tensor, sampling: SamplingParams, positions: Sequence[int]) -> Tensor:
    """One draw at each position, all as rows of one call."""
    rows = SamplingRows.of([sampling] * len(positions), CPU)
    return next_tokens(logits.expand(len(positions), -1), rows, torch.tensor(positions), {route_of(sampling)})


# Filters


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (50, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 1.0, 0.05),
        (50, 0.9, 0.02),
        (1, 0.5, 0.5),
        (0, 0.0, 0.0),
        (200, 0.7, 0),
    ],
)
def test_what_is_drawn_is_what_transformers_keeps(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    """300 tokens, 8,000 draws: every token that transformers keeps with at least one draw in 400 comes, no other does."""
    logits = logits_of(seed, 300, spread=1.5)
    scores, ids = logits[None].clone(), torch.zeros(1, 1, dtype=torch.long)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    expected = torch.softmax(scores[0], -1)
    sampling = SamplingParams(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    drawn = torch.bincount(draws(logits, sampling, range(8_000)), minlength=300)
    assert not drawn[expected == 0].any()
    assert drawn[expected > 1 / 400].all()


@pytest.mark.parametrize("kind", [Route.NARROW, Route.WIDE, Route.WHOLE, Route.NUCLEUS])
def test_draws_follow_the_distribution(kind: Route) -> None:
    """Chi-squared over 20 tokens and 20,000 positions: 19 degrees of freedom, 99.99 % quantile 50.8."""
    logits = logits_of(2, size=20, spread=1.0)
    top_k = {Route.NARROW: 20, Route.WIDE: 999}.get(kind, 0)
    top_p = 0.9999999 if kind is Route.NUCLEUS else 1.0
    sampling = SamplingParams(temperature=0.8, top_p=top_p, top_k=top_k, seed=7)
    assert route_of(sampling) is kind
    expected = torch.softmax(logits / 0.8, -1) * 20_000
    observed = torch.bincount(draws(logits, sampling, range(20_000)), minlength=20)
    assert float(((observed - expected) ** 2 / expected).sum()) < 50.8


def test_the_widest_route_holds_the_largest_top_k() -> None:
    assert LIMITS["top_k"].high <= WIDE


@pytest.mark.parametrize("count", [1, 50, 64, 1000])
@pytest.mark.parametrize("columns", [64, 2048, COLUMNS])
def test_the_largest_scores_are_topks_without_searching_all(count: int, columns: int) -> None:
    scores = torch.stack([logits_of(seed, columns) for seed in range(3)])
    values, ids = best(scores, count)
    assert torch.equal(values, scores.topk(min(count, columns)).values)
    assert torch.equal(scores.gather(1, ids), values)


def test_equal_scores_fall_by_the_lowest_index() -> None:
    """Logits of a bfloat16 model tie often: which of the equals is kept must not depend on how many rows there are."""
    scores = torch.randint(-3, 3, (4, COLUMNS), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 64, 1000):
        expected = torch.stack([torch.sort(row, descending=True, stable=True).indices[:count] for row in scores])
        assert torch.equal(best(scores, count)[1], expected)
    assert torch.equal(best_tokens(scores), scores.argmax(-1))


def test_repetition_penalty_is_transformers() -> None:
    logits, prompt = logits_of(1), torch.tensor([[3, 5, 5, 999]])
    seen = torch.zeros(1, COLUMNS, dtype=torch.bool)
    seen[0, prompt[0]] = True
    expected = RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits[None].clone())
    torch.testing.assert_close(penalize_repetition(logits[None], seen, torch.tensor([1.3])), expected)


def test_nucleus_threshold_on_a_case_done_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(5, -1)
    threshold = nucleus_threshold(probabilities, torch.tensor([0.4, 0.5, 0.6, 0.81, 0.99]))
    assert (probabilities >= threshold[:, None]).sum(-1).tolist() == [1, 1, 2, 3, 4]


# Rows


def mixed(rows: int) -> list[SamplingParams]:
    return [KINDS[Route(row * 3 % len(Route))] for row in range(rows)]


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_a_row_gets_the_same_token_alone_and_beside_others(rows: int) -> None:
    samplings = mixed(rows)
    logits = torch.stack([logits_of(row) for row in range(rows)])
    positions = torch.arange(rows) * 11
    alone = [int(draws(logits[row], samplings[row], [row * 11])) for row in range(rows)]
    parameters = SamplingRows.of(samplings, CPU)
    assert next_tokens(logits, parameters, positions, list(Route)).tolist() == alone
    assert next_tokens_apart(logits, parameters, positions, [route_of(sampling) for sampling in samplings]).tolist() == alone


@pytest.mark.parametrize(
    ("top_p", "min_p", "few"), [(0.9, 0.0, True), (0.0, 0.0, True), (1.0, 0.02, True), (0.95, 0.3, True), (1.0, 0.0, False)]
)
def test_without_top_k_few_candidates_do_where_they_hold_all_that_may_be_drawn(top_p: float, min_p: float, few: bool) -> None:
    """The same tokens as over the whole vocabulary, in real logits' shape: most of the mass on a few hundred tokens."""
    sampling = SamplingParams(temperature=0.8, top_k=0, top_p=top_p, min_p=min_p, seed=8)
    logits = torch.stack([logits_of(seed) for seed in range(40)])
    rows, positions = SamplingRows.of([sampling] * 40, CPU), torch.arange(40)
    found = _race_of_few(logits, rows, positions)
    assert (found is not None) == few
    apart = next_tokens_apart(logits, rows, positions, [route_of(sampling)] * 40)
    assert apart.tolist() == next_tokens(logits, rows, positions, {route_of(sampling)}).tolist()
    assert _race_of_few(torch.zeros(1, COLUMNS), SamplingRows.of([sampling], CPU), positions[:1]) is None


@pytest.mark.parametrize("temperature", [1e-7, 1e-30, 1e-46])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """Scores divided by 1e-38 were infinite, their softmax NaN, and the token always the first."""
    sampling = SamplingParams(temperature=temperature, top_k=0, top_p=0.9)
    assert draws(logits_of(1), sampling, [3]).tolist() == [int(logits_of(1).argmax())]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = logits_of(3)
    for kind in (Route.NARROW, Route.WHOLE):
        one, other = KINDS[kind], SamplingParams(**(vars(KINDS[kind]) | {"seed": 99}))
        assert draws(logits, one, range(20)).tolist() == [int(draws(logits, one, [position])) for position in range(20)]
        assert draws(logits, one, range(20)).tolist() != draws(logits, other, range(20)).tolist()


def test_every_level_holds_what_the_host_sends_it() -> None:
    assert level_of([KINDS[Route.GREEDY]]) is Level.GREEDY
    assert level_of([SamplingParams(), KINDS[Route.GREEDY]]) is Level.NARROW
    assert level_of([SamplingParams(temperature=0, repetition_penalty=1.1)]) is Level.ALL
    for route, sampling in KINDS.items():
        assert route in LEVEL_ROUTES[level_of([sampling])]


# The step


class Decoder:
    """Logits that depend on nothing but the row's own token, slot and position."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        keys = (tokens * 31 + slots) * 1009 + positions
        return torch.stack([logits_of(int(key), self.columns) for key in keys])


def batch_of(samplings: Sequence[SamplingParams], columns: int = 3000) -> Batch:
    batch = Batch(len(samplings), columns, {1, 106}, CPU)
    for slot, sampling in enumerate(samplings):
        batch.start(slot, sampling, (2, 3, slot))
        batch.feed(torch.tensor([slot]), torch.tensor([slot + 5]), torch.tensor([3]))
    return batch


PENALIZED = [
    SamplingParams(temperature=0, repetition_penalty=1.5),
    SamplingParams(temperature=1.2, repetition_penalty=0.7, top_k=5, min_new_tokens=4),
    *KINDS.values(),
]


def test_the_static_step_and_the_one_apart_make_the_same_tokens() -> None:
    decoder, slots = Decoder(3000), list(range(len(PENALIZED)))
    static, apart = batch_of(PENALIZED), batch_of(PENALIZED)
    for _ in range(6):
        one = step(decoder, static, torch.tensor(slots), partial(static.advance, level=Level.ALL))
        assert torch.equal(one, step_apart(decoder, apart, slots))
    assert torch.equal(static.seen, apart.seen)
    assert static.positions.tolist() == [9] * len(slots)


def test_a_slot_goes_on_the_same_whoever_sits_beside_it() -> None:
    decoder, slots = Decoder(3000), list(range(len(PENALIZED)))
    alone, together = batch_of(PENALIZED), batch_of(PENALIZED)
    expected = {slot: [int(step_apart(decoder, alone, [slot])) for _ in range(4)] for slot in slots}
    order = slots[::-1]
    got = torch.stack([step_apart(decoder, together, order) for _ in range(4)], dim=1).tolist()
    assert dict(zip(order, got, strict=True)) == expected


def test_a_row_twice_in_a_step_changes_nothing() -> None:
    """A captured step of 8 rows serves 5 requests: the other rows repeat one of them."""
    decoder = Decoder(3000)
    once, filled = batch_of(PENALIZED[:3]), batch_of(PENALIZED[:3])
    for _ in range(4):
        one = step(decoder, once, torch.tensor([0, 1, 2]), partial(once.advance, level=Level.ALL))
        more = step(decoder, filled, torch.tensor([0, 1, 2, 0, 0]), partial(filled.advance, level=Level.ALL))
        assert more[:3].tolist() == one.tolist()
    assert torch.equal(once.positions, filled.positions)
    assert torch.equal(once.seen, filled.seen)


def test_stops_are_held_back_until_the_minimum() -> None:
    stops = torch.full((1, 300), -5.0)
    stops[0, 106] = 5.0
    batch = Batch(1, 300, {1, 106}, CPU)
    batch.start(0, SamplingParams(temperature=0, min_new_tokens=3), (2, 3))
    for position, held in ((2, True), (4, True), (5, False)):
        for token in (
            batch.draw(stops.clone(), torch.tensor([0]), torch.tensor([position]), Level.GREEDY),
            batch.draw_apart(stops.clone(), [0], torch.tensor([position])),
        ):
            assert (int(token) not in (1, 106)) == held


def test_a_new_request_in_a_slot_forgets_the_old_one() -> None:
    batch = batch_of(PENALIZED)
    batch.start(0, SamplingParams(temperature=0), (7, 8))
    assert batch.seen[0].nonzero().flatten().tolist() == [7, 8]
    assert batch.level([0]) is Level.GREEDY


# Random numbers


def test_noise_is_exponential_and_never_zero() -> None:
    noise = exponential_noise(torch.tensor([1]), torch.tensor([2]), torch.arange(200_000)[None])
    assert noise.min() > 0
    assert float(noise.mean()) == pytest.approx(1, abs=0.01)
    assert float(noise.var()) == pytest.approx(1, abs=0.03)


def test_mix64_is_splitmix64() -> None:
    """The reference sequence for seed 1234567: Vigna's splitmix64.c adds the constant, then mixes."""
    state, outputs = torch.tensor(1234567), []
    for _ in range(3):
        outputs.append(int(mix64(state)) % 2**64)
        state = state + -0x61C8864680B583EB
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


# Parameters


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 2.1}, {"temperature": float("nan")}, {"top_p": -0.1}, {"top_k": 1001}, {"min_p": 2.0}, {"seed": -1},
     {"max_new_tokens": 0}, {"repetition_penalty": 0.0}, {"min_new_tokens": 9, "max_new_tokens": 8},
     {"stop_sequences": ("",)}, {"stop_sequences": ("x",) * 17}],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=f"E1005 .*{next(iter(wrong))}"):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_every_wrong_parameter_is_named_at_once() -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(temperature=9, top_p=9, top_k=-1)
    assert all(name in str(caught.value) for name in ("temperature", "top_p", "top_k"))
