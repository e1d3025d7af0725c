"""Exact masks: the `count` smallest scores fall, ties by lowest flat index. True survives.

Counts, not ratios: `policy.dropped_count` turns a ratio into a count, and a count can be met exactly. Selection by the
k-th smallest value is linear where a stable sort of a layer of 26 million weights takes ten times as long.
"""

import torch
from torch import Tensor


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
