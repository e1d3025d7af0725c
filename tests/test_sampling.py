"""The sampler: transformers' own filters are the oracle, statistics the judge."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from gemma_opt.engine.interface import SamplingParams
from gemma_opt.engine.sampling import (
    exponential_noise,
    keep_probable,
    mix64,
    next_token,
    nucleus_threshold,
    penalize_repetition,
)
from gemma_opt.errors import ParameterError

CPU = torch.device("cpu")


def logits_of(seed: int, size: int = 1000, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (50, 0.9, 0.02), (1, 0.5, 0.5), (0, 0.0, 0.0)],
)
def test_filters_keep_what_transformers_keeps(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = logits_of(seed)
    scores = logits[None].clone()
    ids = torch.zeros(1, 1, dtype=torch.long)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    keep = keep_probable(torch.softmax(logits, -1), top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(keep, torch.isfinite(scores[0]))


def test_the_most_probable_token_always_stays() -> None:
    probabilities = torch.tensor([0.25, 0.25, 0.25, 0.25])
    assert keep_probable(probabilities, top_k=1, top_p=0.0, min_p=1.0).all()  # all tie for the first place


def test_repetition_penalty_is_transformers() -> None:
    logits, prompt = logits_of(1), torch.tensor([[3, 5, 5, 999]])
    seen = torch.zeros(1000, dtype=torch.bool)
    seen[prompt[0]] = True
    expected = RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits[None].clone())[0]
    torch.testing.assert_close(penalize_repetition(logits, seen, 1.3), expected)


def test_nucleus_threshold_on_a_case_done_by_hand() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.6, 2), (0.81, 3), (0.99, 4)):
        assert int((probabilities >= nucleus_threshold(probabilities, top_p)).sum()) == kept


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 20 tokens and 4000 positions: 19 degrees of freedom, 99.99 % quantile 50.8."""
    logits = logits_of(2, size=20, spread=1.0)
    sampling = SamplingParams(temperature=0.8, top_p=1.0, top_k=0, seed=7)
    seen = torch.zeros(20, dtype=torch.bool)
    draws = torch.stack([next_token(logits, sampling, seen=seen, position=position) for position in range(4000)])
    expected = torch.softmax(logits / 0.8, -1) * 4000
    observed = torch.bincount(draws, minlength=20)
    assert float(((observed - expected) ** 2 / expected).sum()) < 50.8


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits, seen = logits_of(3), torch.zeros(1000, dtype=torch.bool)

    def draw(seed: int, position: int) -> int:
        sampling = SamplingParams(temperature=2.0, top_p=1.0, top_k=0, seed=seed)
        return int(next_token(logits, sampling, seen=seen, position=position))

    assert [draw(1, position) for position in range(20)] == [draw(1, position) for position in range(20)]
    assert [draw(1, position) for position in range(20)] != [draw(2, position) for position in range(20)]


def test_zero_temperature_takes_the_best() -> None:
    logits = logits_of(4)
    sampling = SamplingParams(temperature=0.0, top_p=0.1, seed=3)
    assert next_token(logits, sampling, seen=torch.zeros(1000, dtype=torch.bool), position=0) == logits.argmax()


def test_noise_is_exponential_and_never_zero() -> None:
    noise = exponential_noise(seed=1, position=2, count=200_000, device=CPU)
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
