"""Packed linears as the Triton kernels read them, and the products of prefill, where rows are many."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from gemma_opt.engine.kernels.triton_grid import settle
from gemma_opt.engine.kernels.triton_library import multiply_by_library
from gemma_opt.engine.kernels.triton_linear import FEW_ROWS, Blocks, Matrix, multiply
from gemma_opt.engine.kernels.triton_tuning import Tuning
from gemma_opt.engine.linear import gated_gelu, linear
from gemma_opt.engine.packed import (
    FloatRows,
    Fp8Rows,
    GridInput,
    Int4Halves,
    Int4Rows,
    Int8Rows,
    LowRankRows,
    PackedLinear,
    Stacked,
)
from gemma_opt.engine.weights import TextWeights

OLDEST_FP8 = (8, 9)  # compute capability: Triton knows e4m3 from here on


@singledispatch
def matrix_of(packed: PackedLinear) -> Matrix | None:
    """The kernels' view of an arranged linear: the same tensors. None: torch operations compute it."""
    return None


@matrix_of.register
def _(packed: FloatRows) -> Matrix | None:
    return Matrix(packed.weight, packed.weight.shape[1])


@matrix_of.register
def _(packed: Int8Rows) -> Matrix | None:
    return Matrix(packed.weight, packed.weight.shape[1], packed.scale)


@matrix_of.register
def _(packed: Fp8Rows) -> Matrix | None:
    if packed.weight.is_cuda and torch.cuda.get_device_capability(packed.weight.device) < OLDEST_FP8:
        return None
    return Matrix(packed.weight, packed.weight.shape[1], packed.scale)


@matrix_of.register
def _(packed: Int4Halves) -> Matrix | None:
    return Matrix(packed.packed, packed.in_features, packed.steps, packed.group, packed.half)


@matrix_of.register
def _(packed: GridInput) -> Matrix | None:
    found = matrix_of(packed.rows)
    return found and replace(found, activation=packed.activation, input_scale=packed.input_scale)


def arrange(packed: PackedLinear) -> PackedLinear:
    """The order that these kernels read: an `Arrange`."""
    match packed:
        case Stacked():
            return Stacked(tuple(arrange(part) for part in packed.parts))
        case LowRankRows():
            return LowRankRows(arrange(packed.left), arrange(packed.right))
        case GridInput(rows=Int4Rows() as rows):
            return replace(packed, rows=Int4Halves.of(rows))
        case Int4Rows():
            return Int4Halves.of(packed)
        case _:
            return packed


def uses_of(weights: TextWeights) -> list[tuple[Matrix, bool]]:
    """Every matrix that kernels multiply with in a step, and whether the product is gated."""
    gated = {id(layer.gate_up) for layer in weights.layers}  # parts of a stack are multiplied apart, not gated
    linears = [part for layer in weights.layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [weights.head]
    found = ((matrix_of(part), id(part) in gated) for packed in linears for part in parts_of(packed))
    return [(matrix, is_gated) for matrix, is_gated in found if matrix]


def parts_of(packed: PackedLinear) -> tuple[PackedLinear, ...]:
    """What is multiplied with at once: a linear itself, those that are stacked in it, or the two of low rank."""
    match packed:
        case Stacked():
            return tuple(part for stacked in packed.parts for part in parts_of(stacked))
        case LowRankRows():
            return *parts_of(packed.right), *parts_of(packed.left)
        case _:
            return (packed,)


def settled(matrix: Matrix, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a matrix multiplies for activations x [rows, in], and by what its results are multiplied: float32 [rows]."""
    if matrix.activation == "none":
        return x, None
    steps, scales = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(len(x), device=x.device)
    settle(x.contiguous()[None], matrix.activation, matrix.input_scale, steps, scales)
    return steps, scales


class TritonLinear:
    """Products on a GPU. What is fastest by the number of rows:

    up to FEW_ROWS the decode kernels with their blocks; up to `triton_tuning.LONGEST` what was measured, the same kernels with
    larger blocks or the vendor's library; for more the library. Linears without a kernel compute themselves.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning

    def __call__(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """x: [rows, in]. Returns [rows, out] in x's dtype."""
        found = self.partial(packed, x)
        return (found[0] if len(found) == 1 else found.sum(0)).to(x.dtype)

    def partial(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """Partial results [splits, rows, out], float, whose sum is the product: for kernels that add them up."""
        if isinstance(packed, Stacked):
            return torch.cat([self(part, x) for part in packed.parts], dim=-1)[None]
        if isinstance(packed, LowRankRows):
            return self.partial(packed.left, self(packed.right, x))
        matrix = matrix_of(packed)
        if matrix is None:
            return linear(packed, x)[None]
        blocks = self._blocks(matrix, len(x), gated=False)
        return _multiply(matrix, x, blocks) if blocks else multiply_by_library(matrix, *settled(matrix, x))[None]

    def gated(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """gelu(gate) · up, [rows, out / 2] in x's dtype, of a linear that is gate over up."""
        matrix = matrix_of(packed)
        blocks = matrix and self._blocks(matrix, len(x), gated=True)
        return _multiply(matrix, x, blocks, gated=True)[0] if matrix and blocks else gated_gelu(self(packed, x))

    def _blocks(self, matrix: Matrix, rows: int, *, gated: bool) -> Blocks | None:
        """None: the library."""
        few = rows <= FEW_ROWS
        return self._tuning.blocks(matrix, gated=gated) if few else self._tuning.blocks_of_many(matrix, rows, gated=gated)


def _multiply(matrix: Matrix, x: Tensor, blocks: Blocks, *, gated: bool = False) -> Tensor:
    """What `multiply` makes, in memory of its own: float32 where decode's kernels, which are compiled so, compute it."""
    x, x_scale = settled(matrix, x)
    narrow = gated or (blocks.splits == 1 and len(x) > FEW_ROWS)
    width = matrix.out_features // 2 if gated else matrix.out_features
    out = torch.empty(blocks.splits, len(x), width, dtype=x.dtype if narrow else torch.float32, device=x.device)
    multiply(matrix, x.contiguous(), out, blocks, x_scale=x_scale, gated=gated)
    return out
