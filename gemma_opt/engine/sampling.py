"""Logits → the next token, without sorting the vocabulary.

Filters apply in transformers' order: repetition penalty, temperature, top-k, top-p, min-p. Each becomes a threshold on
the probabilities. The draw is the exponential race: token i wins with the smallest E_i / p_i, which samples exactly
from p. E_i comes from a counter-based generator of (seed, position, token), so a reply depends on its seed alone, not
on its neighbours, the device or what was drawn before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.engine.interface import SamplingParams

BISECTION_STEPS = 40  # halvings of the top-p threshold: below float32 resolution of probabilities


def next_token(logits: Tensor, sampling: SamplingParams, *, seen: Tensor, position: int) -> Tensor:
    """The next token id as a 0-d int64 tensor on the logits' device.

    logits: [vocabulary], any float type. seen: [vocabulary] bool, tokens of prompt and reply so far (for the repetition
    penalty). position: index of the new token in the whole sequence, the counter of the random numbers.
    """
    scores = penalize_repetition(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores.argmax()
    probabilities = torch.softmax(scores / sampling.temperature, dim=-1)
    kept = keep_probable(probabilities, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    race = exponential_noise(sampling.seed, position, logits.shape[-1], logits.device) / probabilities
    return race.masked_fill(~kept, torch.inf).argmin()


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by `penalty`. Source: Keskar et al. 2019, CTRL."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_probable(probabilities: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Mask of the tokens that may be drawn. probabilities: [vocabulary] float32; returns [vocabulary] bool.

    top-k keeps the k most probable (and ties with the last of them); top-p then the smallest set of the most probable
    whose share of what top-k left reaches p; min-p those at least min_p as probable as the most probable one.
    The most probable token always stays.
    """
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    candidates = probabilities
    if 0 < top_k < probabilities.numel():
        candidates = probabilities.topk(top_k).values
        keep = probabilities >= candidates[-1]
    if top_p < 1:
        keep &= probabilities >= nucleus_threshold(candidates, top_p)
    if min_p > 0:
        keep &= probabilities >= min_p * probabilities.max()
    return keep


def nucleus_threshold(probabilities: Tensor, top_p: float) -> Tensor:
    """The largest threshold t for which the entries ≥ t hold at least top_p of the total. 0-d tensor, by bisection."""
    wanted = top_p * probabilities.sum()
    low, high = torch.zeros_like(wanted), probabilities.max()
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        enough = torch.where(probabilities >= middle, probabilities, 0.0).sum() >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    enough = torch.where(probabilities >= high, probabilities, 0.0).sum() >= wanted
    return torch.where(enough, high, low)


def exponential_noise(seed: int, position: int, count: int, device: torch.device) -> Tensor:
    """`count` independent Exp(1) numbers, float32 > 0, a pure function of (seed, position, index)."""
    index = torch.arange(count, dtype=torch.int64, device=device)
    bits = mix64(index ^ mix64(torch.tensor(position, device=device) ^ mix64(torch.tensor(seed, device=device))))
    uniform = ((bits & 0x7FFFFF).float() + 0.5) * 2**-23  # 24 bits would round up to 1, and its logarithm to 0
    return -torch.log(uniform)


def mix64(value: Tensor) -> Tensor:
    """The SplitMix64 output function on int64 tensors, arithmetic modulo 2^64. Source: Steele, Lea, Flood 2014."""
    value = value + -0x61C8864680B583EB
    value = (value ^ _shift_right(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift_right(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, count: int) -> Tensor:
    """Logical shift: torch's own repeats the sign bit."""
    return (value >> count) & ((1 << (64 - count)) - 1)
