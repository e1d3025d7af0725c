"""Recorded decode steps give the tokens of plain ones, whatever rows come. On a GPU they are CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from models import DEVICE, placed_model

from gemma_opt.engine.batch import Batch, step_apart
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.graphs import RecordedSteps, Recorder, row_counts
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.engine.kernels.gpu import find_samplers
from gemma_opt.engine.weights import take_weights

SAMPLINGS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=0, repetition_penalty=1.3),
)
TURNS = ([0], [0, 1], [2, 0, 1], [1], [1, 2])  # slots that decode together


def test_row_counts_are_powers_of_two_and_the_number_of_slots() -> None:
    assert row_counts(1) == (1,)
    assert row_counts(3) == (1, 2, 3)
    assert row_counts(8) == (1, 2, 4, 8)


@pytest.fixture(scope="module")
def ready() -> tuple[TextModel, Batch]:
    """A model with three slots, and their batch."""
    weights = take_weights(placed_model(), release=False)
    model = TextModel(weights, KvCache(weights, slots=3, context=64))
    return model, Batch(3, weights.shape.vocabulary, [1, 106], DEVICE)


def start(model: TextModel, batch: Batch) -> None:
    """Put a prompt and its first token into every slot."""
    for slot, sampling in enumerate(SAMPLINGS):
        prompt = [2, *range(40 + slot, 50 + 2 * slot)]
        model.prefill(slot, model.embed(torch.tensor(prompt, device=DEVICE)), 0)
        batch.start(slot, sampling, prompt)
        where = (torch.tensor([value], device=DEVICE) for value in (slot, 77, len(prompt)))
        batch.feed(*where)


@torch.no_grad()
def test_recorded_steps_give_the_tokens_of_plain_steps(ready: tuple[TextModel, Batch]) -> None:
    """Three rows come in a recording of three, one and two in their own, greedy and sampled and penalized together."""
    model, batch = ready
    start(model, batch)
    expected = [step_apart(model.decode, batch, slots).tolist() for slots in TURNS]
    recorded = RecordedSteps(model.decode, batch, Recorder(DEVICE), find_samplers(batch))
    start(model, batch)
    captures = recorded.captures
    assert [recorded(slots)() for slots in TURNS] == expected
    assert recorded.captures == captures


@torch.no_grad()
def test_rows_that_fill_a_recording_up_change_nothing() -> None:
    """Five slots are recorded as 1, 2, 4 and 5 rows: three of them run as four, one of them twice."""
    weights = take_weights(placed_model(), release=False)
    model = TextModel(weights, KvCache(weights, slots=5, context=64))
    batch = Batch(5, weights.shape.vocabulary, [1, 106], DEVICE)
    recorded = RecordedSteps(model.decode, batch, Recorder(DEVICE), find_samplers(batch))
    start(model, batch)
    together = [recorded([2, 0, 1])() for _ in range(3)]
    start(model, batch)
    alone = [[recorded([slot])()[0] for slot in (2, 0, 1)] for _ in range(3)]
    assert together == alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@torch.no_grad()
def test_every_row_count_and_level_is_captured_once(ready: tuple[TextModel, Batch]) -> None:
    model, batch = ready
    recorded = RecordedSteps(model.decode, batch, Recorder(DEVICE), find_samplers(batch))
    assert recorded.captures == 3 * 3
    start(model, batch)
    for slots in TURNS:
        recorded(slots)()
    assert recorded.captures == 3 * 3
