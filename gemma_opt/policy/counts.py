"""How many of what a recipe's ratios drop and keep."""

from __future__ import annotations

import math
from functools import singledispatch

from gemma_opt.recipe import ADMM, Compact, Gradual, LayerNorm, LowRank, Magnitude, Rows, SparseGPT, Wanda, parse_n_m


def dropped_count(size: int, ratio: float) -> int:
    """How many of `size` things a ratio drops: Python's round, which takes exact halves to the even count."""
    return round(size * ratio)


@singledispatch
def pool_size(stage: object, shape: tuple[int, ...]) -> int:
    """The number of things among which a stage drops its ratio: the weights of a layer, of a row or of a group of M, or a
    layer's rows or channels.

    shape: [out, in] of one layer. A new method registers its own.
    """
    raise NotImplementedError(f"policy.pool_size knows no {type(stage).__name__}")


@pool_size.register(Magnitude)
@pool_size.register(Gradual)
@pool_size.register(Wanda)
@pool_size.register(SparseGPT)
@pool_size.register(ADMM)
def _(stage: Magnitude | Gradual | Wanda | SparseGPT | ADMM, shape: tuple[int, ...]) -> int:
    if n_m := parse_n_m(stage.pattern):
        return n_m[1]
    return shape[1] if stage.pattern == "per_row" else math.prod(shape)


@pool_size.register(LayerNorm)
def _(stage: LayerNorm, shape: tuple[int, ...]) -> int:
    return math.prod(shape)


@pool_size.register(Rows)
def _(stage: Rows, shape: tuple[int, ...]) -> int:
    return shape[0]


def kept_channels(stage: Compact, channels: int) -> int:
    """How many MLP channels a compact stage leaves: (1 − ratio) of them, rounded to the nearest multiple, never 0."""
    return max(1, round(channels * (1 - stage.ratio) / stage.multiple)) * stage.multiple


def kept_rank(section: LowRank, shape: tuple[int, ...]) -> int:
    """The rank of a linear [out, in]: for a ratio the nearest multiple, never 0; for an energy the largest that still saves."""
    rows, columns = shape
    even = rows * columns / (rows + columns)  # two factors of this rank are as large as the linear
    if section.ratio is None:
        return max(1, math.ceil(even / section.multiple) - 1) * section.multiple
    return max(1, round(even * (1 - section.ratio) / section.multiple)) * section.multiple


def saves(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether two factors of that rank are smaller than a linear [out, in]."""
    return rank * sum(shape) < math.prod(shape)
