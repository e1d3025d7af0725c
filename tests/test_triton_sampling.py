"""The sampler's kernels draw the tokens of the torch operations and leave the batch alike. Interpreted where no GPU is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from models import DEVICE, placed_model
from torch import Tensor

from gemma_opt.engine.batch import Batch, Level, step_apart
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.graphs import RecordedSteps, Recorder
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.engine.kernels.gpu import find_samplers
from gemma_opt.engine.kernels.triton_sampling import TritonSampler
from gemma_opt.engine.sampling import NARROW
from gemma_opt.engine.weights import take_weights

STOPS = (1, 106)
VOCABULARIES = [20, 64, 1000, 5003, 9000]  # less than NARROW, one chunk, fewer chunks than NARROW, one more piece, more
GREEDY = SamplingParams(temperature=0)
EDGES = [
    GREEDY,
    SamplingParams(),
    *[SamplingParams(temperature=1.5, top_k=top_k, top_p=1.0, seed=top_k) for top_k in (1, 2, 7, 50, NARROW)],
    *[SamplingParams(temperature=1.0, top_k=NARROW, top_p=top_p, seed=5) for top_p in (0.0, 1e-6, 0.3, 0.5, 0.999)],
    *[SamplingParams(temperature=2.0, top_k=40, top_p=1.0, min_p=min_p, seed=2**31) for min_p in (1e-4, 0.1, 0.5, 1.0)],
    SamplingParams(temperature=0.01, top_k=30, top_p=0.7, min_p=0.05, seed=2**32 - 1),
    SamplingParams(temperature=2.0, top_k=60, top_p=0.9, seed=11, min_new_tokens=3),
    SamplingParams(temperature=0, min_new_tokens=3),
]


def random_logits(rows: int, vocabulary: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def batch_of(samplings: Sequence[SamplingParams], vocabulary: int, stops: Sequence[int] = STOPS) -> Batch:
    """Every slot has a prompt of three tokens, so that stop tokens of a minimum of 3 are held back at positions to 5."""
    batch = Batch(len(samplings), vocabulary, [stop for stop in stops if stop < vocabulary], DEVICE)
    for slot, sampling in enumerate(samplings):
        batch.start(slot, sampling, (2, 3, 4))
    return batch


def check(
    logits: Tensor,
    samplings: Sequence[SamplingParams],
    positions: Tensor,
    *,
    level: Level = Level.NARROW,
    slots: Sequence[int] | None = None,
    stops: Sequence[int] = STOPS,
) -> list[int]:
    """One step of kernels and one of torch operations from the same state end alike. Returns its tokens."""
    where = torch.tensor(range(len(samplings)) if slots is None else slots, device=DEVICE)
    mine, meant = (batch_of(samplings, logits.shape[1], stops) for _ in range(2))
    logits, positions = logits.to(DEVICE), positions.to(DEVICE)
    found = TritonSampler(mine, level)(logits, where, positions)
    expected = meant.advance(logits.clone(), where, positions, level)
    assert found.tolist() == expected.tolist()
    for name in ("tokens", "positions", "seen"):
        assert torch.equal(getattr(mine, name), getattr(meant, name)), name
    return found.tolist()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_kind_of_request_gets_the_torch_operations_token(vocabulary: int) -> None:
    """All in one batch, greedy rows too."""
    for turn in range(3):
        logits = random_logits(len(EDGES), vocabulary, turn, spread=(0.5, 2.0, 8.0)[turn])
        check(logits, EDGES, torch.arange(len(EDGES)) * 7 + turn)


def test_many_draws_of_one_row_are_the_torch_operations_draws() -> None:
    """100 positions of one request."""
    sampling = SamplingParams(temperature=1.2, top_k=50, top_p=0.95, seed=9)
    tokens = check(random_logits(1, 5003, 1, 1.0).expand(100, -1), [sampling] * 100, torch.arange(100) + 100)
    assert len(set(tokens)) > 20


@pytest.mark.parametrize("level", [Level.GREEDY, Level.NARROW])
def test_gemmas_vocabulary_is_one_chunk_more_than_a_power_of_two(level: Level) -> None:
    """The best tokens are the very last."""
    logits = random_logits(2, 262_208, 3, spread=2.0)
    logits[:, -70:] += 9
    samplings = [GREEDY, SamplingParams(seed=1) if level else GREEDY]
    assert min(check(logits, samplings, torch.tensor([5, 6]), level=level)) >= 262_208 - 70


@pytest.mark.parametrize("level", [Level.GREEDY, Level.NARROW])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_among_equal_logits_the_lower_ids_are_the_better(vocabulary: int, level: Level) -> None:
    """Six values only, then one alone: which of the equals are candidates is decided by the ids."""
    samplings = EDGES if level else [GREEDY] * len(EDGES)
    draw = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(-3, 3, (len(samplings), vocabulary), generator=draw).float()
    check(logits, samplings, torch.arange(len(samplings)), level=level)
    check(torch.zeros_like(logits), samplings, torch.arange(len(samplings)), level=level)


def test_top_p_ends_where_its_share_is_reached_exactly() -> None:
    """Four equals: two of them hold a half."""
    sampling = SamplingParams(temperature=1, top_k=4, top_p=0.5)
    assert set(check(torch.zeros(30, 500), [sampling] * 30, torch.arange(30) + 9)) == {0, 1}


@pytest.mark.parametrize("vocabulary", [1000, 9000])
@pytest.mark.parametrize("left", [1, 3, 100])
def test_impossible_tokens_are_not_drawn(vocabulary: int, left: int) -> None:
    """All logits but `left` are −inf, so most chunks have nothing, and the candidates may be fewer than NARROW."""
    logits = torch.full((len(EDGES), vocabulary), -torch.inf)
    places = torch.randperm(vocabulary - 200, generator=torch.Generator().manual_seed(left))[:left] + 200
    logits[:, places] = random_logits(len(EDGES), left, left)
    tokens = check(logits, EDGES, torch.arange(len(EDGES)))
    assert set(tokens) <= set(places.tolist())


@pytest.mark.parametrize("level", [Level.GREEDY, Level.NARROW])
def test_stop_tokens_are_held_back_until_the_minimum(level: Level) -> None:
    """The step at position p makes the token at p + 1; a minimum of 3 after a prompt of 3 frees position 6."""
    stops = (1, 106, 4999)
    logits = random_logits(4, 5003, 0, spread=1.0)
    logits[:, list(stops)] = torch.tensor([30.0, 29.0, 31.0])
    wanted = SamplingParams(temperature=0, min_new_tokens=3)
    positions = torch.tensor([2, 4, 5, 6])
    tokens = check(logits, [wanted] * 4, positions, level=level, stops=stops)
    assert [token in stops for token in tokens] == [False, False, True, True]
    check(logits, [wanted] * 4, positions, level=level, stops=())


@pytest.mark.parametrize("level", [Level.GREEDY, Level.NARROW])
def test_a_slot_may_fill_a_step_up(level: Level) -> None:
    """Slots in any order, one of them three times, and some at rest: their state stays."""
    samplings = EDGES if level else [GREEDY] * len(EDGES)
    slots = [3, 1, 4, 3, 3]
    logits = random_logits(3, 1000, 4)[[0, 1, 2, 0, 0]]
    tokens = check(logits, samplings, torch.tensor([9, 5, 2, 9, 9]), level=level, slots=slots)
    assert tokens[0] == tokens[3] == tokens[4]


def test_logits_may_be_rows_of_a_wider_matrix_and_stay_as_they_are() -> None:
    batch = batch_of([SamplingParams(seed=4)] * 2, 1000)
    wide = random_logits(2, 1200, 8).to(DEVICE)
    before, slots = wide.clone(), torch.arange(2, device=DEVICE)
    found = TritonSampler(batch, Level.NARROW)(wide[:, :1000], slots, slots + 9).tolist()
    assert found == batch.draw(wide[:, :1000].clone(), slots, slots + 10, Level.NARROW).tolist()
    assert torch.equal(wide, before)


def test_more_rows_than_slots_are_refused() -> None:
    sampler = TritonSampler(batch_of([GREEDY], 1000), Level.GREEDY)
    with pytest.raises(ValueError, match="at most 1"):
        sampler(torch.zeros(2, 1000, device=DEVICE), *torch.zeros(2, 2, dtype=torch.int64, device=DEVICE))


@torch.no_grad()
def test_recorded_steps_take_the_kernels_and_give_the_same_tokens() -> None:
    """Four slots in steps of one, two and four rows; on a GPU in CUDA graphs. The last has a level that has no kernels."""
    samplings = (GREEDY, SamplingParams(seed=3), SamplingParams(temperature=0.7, top_k=64, seed=4),
                 SamplingParams(temperature=0, repetition_penalty=1.3))  # fmt: skip
    turns = ([0], [1], [2, 0, 1], [0, 1], [3, 1], [0], [2, 3])
    weights = take_weights(placed_model(), release=False)
    model = TextModel(weights, KvCache(weights, slots=4, context=64))
    batch = Batch(4, weights.shape.vocabulary, STOPS, DEVICE)

    def start() -> None:
        for slot, sampling in enumerate(samplings):
            prompt = [2, *range(40 + slot, 50 + 2 * slot)]
            model.prefill(slot, model.embed(torch.tensor(prompt, device=DEVICE)), 0)
            batch.start(slot, sampling, prompt)
            batch.feed(*(torch.tensor([value], device=DEVICE) for value in (slot, 77, len(prompt))))

    start()
    expected = [step_apart(model.decode, batch, slots).tolist() for slots in turns]
    samplers = {level: TritonSampler(batch, level) for level in (Level.GREEDY, Level.NARROW)}
    recorded = RecordedSteps(
        model.decode, batch, Recorder(DEVICE), samplers | {Level.ALL: partial(batch.advance, level=Level.ALL)}
    )
    start()
    assert [recorded(slots)() for slots in turns] == expected


def test_the_device_decides_which_samplers_there_are() -> None:
    samplers = find_samplers(batch_of([GREEDY], 1000))
    kernels = {level for level, sampler in samplers.items() if isinstance(sampler, TritonSampler)}
    assert set(samplers) == set(Level)
    assert kernels == ({Level.GREEDY, Level.NARROW} if DEVICE.type == "cuda" else set())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="200 steps at Gemma's vocabulary take a GPU")
def test_long_runs_at_gemmas_vocabulary_on_a_gpu() -> None:
    """Compiled, 4,097 chunks, coarse logits that tie and fine ones, every kind of request side by side."""
    for turn in range(200):
        logits = random_logits(len(EDGES), 262_208, turn, spread=2.0)
        positions = torch.arange(len(EDGES)) * 3 + turn
        check(logits if turn % 2 else logits.to(torch.bfloat16).float(), EDGES, positions)
