"""Throughput figures: percentiles by hand, and a round on the bundled model that has to add up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from gemma_opt.errors import UsageError
from gemma_opt.loading import resolve
from gemma_opt.service import Service
from gemma_opt.throughput import measure, percentiles, table, unlike_prompts

pytestmark = pytest.mark.timed


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    running = Service.load(resolve("small-int8"), "cpu", slots=3)
    yield running
    running.close()


def test_percentiles_by_hand() -> None:
    assert percentiles([5.0]) == {"p50": 5.0, "p90": 5.0, "p99": 5.0}
    assert percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p90": 3.0, "p99": 3.0}


def test_prompts_are_unlike_and_of_the_length_asked_for(service: Service) -> None:
    prompts = unlike_prompts(service, 20, 32)
    assert {len(prompt.token_ids) for prompt in prompts} == {32}
    assert len({prompt.token_ids[:8] for prompt in prompts}) == 20
    with pytest.raises(UsageError):
        unlike_prompts(service, 10_000, 1_000)


def test_a_round_adds_up(service: Service) -> None:
    started = time.monotonic()
    found = measure(service, unlike_prompts(service, 3, 32), 20)
    seconds = time.monotonic() - started
    assert (found.requests, found.prompt_tokens, found.new_tokens) == (3, 32, 20)
    assert found.total_tokens_per_second >= 3 * 20 / seconds
    assert 0 < found.time_to_first_token_s["p50"] <= found.time_to_first_token_s["p99"] < seconds
    assert found.request_tokens_per_second > 19 / seconds
    assert table("small", [found]).row_count == 1


def test_an_answer_that_would_be_cut_short_is_refused(service: Service) -> None:
    """It was reported as if all its tokens had been made."""
    with pytest.raises(UsageError, match="100 tokens in and 2,000 out are 2,100, and a slot of this model holds 2,048"):
        measure(service, unlike_prompts(service, 1, 100), 2000)
