"""Exact masks: the `count` smallest scores fall, ties by lowest flat index. True survives.

Counts, not ratios: `policy.dropped_count` turns a ratio into a count, and a count can be met exactly. Selection by the
k-th smallest value is linear where a stable sort of a layer of 26 million weights takes ten times as long.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from gemma_opt.recipe import parse_n_m

_LOW_BITS = 16


def per_row(score: Tensor, count: int) -> Tensor:
    """Keep all but the `count` smallest scores of every row; ties fall from the left.

    score: [rows, columns], no NaN; count: 0..columns. Returns bool [rows, columns].
    """
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=1, keepdim=True).values
    below, tied = score < threshold, score == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    return ~(below | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= missing)))


def per_layer(score: Tensor, count: int) -> Tensor:
    """Keep all but the `count` smallest scores of the whole tensor; ties fall by lowest flat index.

    score: any shape, no NaN; count: 0..numel. Returns bool of the same shape.
    """
    return per_row(score.reshape(1, -1), count).reshape(score.shape)


def rows(score: Tensor, count: int) -> Tensor:
    """Keep all but the `count` rows of smallest score. score: [out]; count: 0..out. Returns bool [out, 1], for [out, in]."""
    return per_layer(score, count)[:, None]


def n_m(score: Tensor, keep: int, group: int) -> Tensor:
    """Keep `keep` of every `group` neighbouring columns of a row; of equal scores the left one falls.

    score: [rows, columns], columns a multiple of group. Returns bool [rows, columns].
    """
    return per_row(score.reshape(-1, group), group - keep).reshape(score.shape)


def global_counts(scores: Callable[[], Iterable[Tensor]], count: int) -> list[int]:
    """How many of the `count` smallest scores of all tensors together lie in each; ties fall to the earlier.

    scores: called three times, so that only one tensor at a time need exist; float32, ≥ 0, no NaN. Exact: such floats are
    ordered as their bit patterns are, so two histograms of 16 bits find the threshold.
    """

    def patterns() -> Iterator[Tensor]:
        return (score.reshape(-1).view(torch.int32) for score in scores())

    size = 1 << _LOW_BITS
    high = sum(torch.bincount(bits >> _LOW_BITS, minlength=size) for bits in patterns())
    bucket, below = _locate(torch.as_tensor(high), count)
    low = sum(torch.bincount(bits[bits >> _LOW_BITS == bucket] & (size - 1), minlength=size) for bits in patterns())
    rest, below_rest = _locate(torch.as_tensor(low), count - below)
    threshold, tied_left = (bucket << _LOW_BITS) | rest, count - below - below_rest
    counts: list[int] = []
    for bits in patterns():
        tied = min(tied_left, int((bits == threshold).sum()))
        counts.append(int((bits < threshold).sum()) + tied)
        tied_left -= tied
    return counts


def _locate(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bucket in which the count-th smallest lies, and how many lie in the buckets before it."""
    upto = histogram.cumsum(dim=0)
    bucket = int(torch.searchsorted(upto, count))
    return bucket, int(upto[bucket - 1]) if bucket else 0


def of_pattern(score: Tensor, pattern: str, count: int) -> Tensor:
    """The mask of a recipe's pattern: "per_layer" (count: of all), "per_row" (of every row) or "N:M" (unused)."""
    if group := parse_n_m(pattern):
        return n_m(score, *group)
    return per_row(score, count) if pattern == "per_row" else per_layer(score, count)
