"""Packed linears as the Triton kernels read them, and the products of prefill, where rows are many."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from gemma_opt.engine.kernels.triton_grid import settle
from gemma_opt.engine.kernels.triton_library import multiply_by_library
from gemma_opt.engine.kernels.triton_linear import FEW_ROWS, LEAST_ROWS, MOST_ROWS, Matrix, multiply
from gemma_opt.engine.kernels.triton_tuning import Tuning
from gemma_opt.engine.linear import linear
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
TILES = tuple(2**power for power in range(LEAST_ROWS.bit_length() - 1, MOST_ROWS.bit_length()))  # of rows


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


def linears_of(weights: TextWeights) -> list[PackedLinear]:
    """Every linear of the layers, and the head."""
    return [part for layer in weights.layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [weights.head]


def uses_of(weights: TextWeights) -> list[tuple[Matrix, bool]]:
    """Every matrix that kernels multiply with in a step, and whether the product is gated."""
    gated = {id(layer.gate_up) for layer in weights.layers}  # parts of a stack are multiplied apart, not gated
    found = ((matrix_of(part), id(part) in gated) for packed in linears_of(weights) for part in parts_of(packed))
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
    """A `Linear` on a GPU. What is fastest by the number of rows:

    up to FEW_ROWS the decode kernels with their blocks; up to MOST_ROWS what was measured, the same kernels with larger
    blocks or the vendor's library; for more the library. Linears without a kernel compute themselves.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning

    def __call__(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """x: [rows, in]. Returns [rows, out] in x's dtype."""
        if isinstance(packed, Stacked):
            return torch.cat([self(part, x) for part in packed.parts], dim=-1)
        if isinstance(packed, LowRankRows):
            return self(packed.left, self(packed.right, x))
        matrix, rows = matrix_of(packed), x.shape[0]
        if matrix is None:
            return linear(packed, x)
        x, x_scale = settled(matrix, x)
        blocks = self._tuning.blocks(matrix) if rows <= FEW_ROWS else self._tuning.blocks_of_many(matrix)
        if blocks is None or rows > MOST_ROWS:
            return multiply_by_library(matrix, x, x_scale)
        dtype = x.dtype if blocks.splits == 1 else torch.float32
        out = torch.empty(blocks.splits, rows, matrix.out_features, dtype=dtype, device=x.device)
        multiply(matrix, x.contiguous(), out, blocks, x_scale=x_scale)
        return out[0] if blocks.splits == 1 else out.sum(0).to(x.dtype)

    def warm_up(self, weights: TextWeights) -> None:
        """Compile what a prompt of any length may need, so that no request waits for it: one product of every kind."""
        parts = (part for packed in linears_of(weights) for part in parts_of(packed))
        found = ((part, matrix_of(part)) for part in parts)
        kinds = {(matrix.key, matrix.activation): (part, matrix.in_features) for part, matrix in found if matrix}
        for part, inputs in kinds.values():
            for rows in (*TILES, MOST_ROWS + 1):
                self(part, torch.zeros(rows, inputs, dtype=weights.dtype, device=weights.device))
