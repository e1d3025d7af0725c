"""Packed linears as the Triton kernels read them, and the products of prefill, where rows are many."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.engine.kernels.triton_linear import LEAST_ROWS, MOST_ROWS, Matrix, dequantize_int4, multiply
from gemma_opt.engine.kernels.triton_tuning import Tuning
from gemma_opt.engine.linear import linear
from gemma_opt.engine.weights import FloatRows, Fp8Rows, Int4Halves, Int4Rows, Int8Rows, PackedLinear, Stacked, TextWeights

PIECE_BYTES = 32 * 2**20  # a 4B model's largest matrix is 105 MB in bfloat16
TILES = tuple(2**power for power in range(LEAST_ROWS.bit_length() - 1, MOST_ROWS.bit_length()))  # of rows


class Unsupported(Exception):
    """What the Triton kernels do not compute."""


@singledispatch
def matrix_of(packed: PackedLinear) -> Matrix:
    """The kernels' view of an arranged linear: the same tensors. Raises Unsupported."""
    raise Unsupported(type(packed).__name__)


@matrix_of.register
def _(packed: FloatRows) -> Matrix:
    return Matrix(packed.weight, packed.weight.shape[1])


@matrix_of.register(Int8Rows)
@matrix_of.register(Fp8Rows)
def _(packed: Int8Rows | Fp8Rows) -> Matrix:
    return Matrix(packed.weight, packed.weight.shape[1], packed.scale)


@matrix_of.register
def _(packed: Int4Halves) -> Matrix:
    return Matrix(packed.packed, packed.in_features, packed.steps, packed.group, packed.half)


def arrange(packed: PackedLinear) -> PackedLinear:
    """The order that these kernels read: an `Arrange`."""
    if isinstance(packed, Stacked):
        return Stacked(tuple(arrange(part) for part in packed.parts))
    return Int4Halves.of(packed) if isinstance(packed, Int4Rows) else packed


def uses_of(weights: TextWeights) -> list[tuple[Matrix, bool]]:
    """Every matrix a step multiplies with, and whether the product is gated. Raises Unsupported."""
    uses: list[tuple[Matrix, bool]] = []
    for layer in weights.layers:
        uses += [(matrix_of(packed), False) for packed in (layer.qkv, layer.o, layer.down)]
        uses.append((matrix_of(layer.gate_up), True))
    return [*uses, (matrix_of(weights.head), False)]


class TritonLinear:
    """A `Linear` on a GPU.

    Up to `triton_linear.MOST_ROWS` rows, reading the weights is what takes time: the decode kernels do it. For more, the
    arithmetic is, and the vendor's library does it on weights converted for the moment.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning

    def __call__(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """x: [rows, in]. Returns [rows, out] in x's dtype."""
        if isinstance(packed, Stacked):
            return torch.cat([self(part, x) for part in packed.parts], dim=-1)
        if x.shape[0] <= MOST_ROWS:
            return self._few(matrix_of(packed), x.contiguous())
        if isinstance(packed, Int4Halves):
            return functional.linear(x, dequantize_int4(matrix_of(packed), x.dtype))
        if isinstance(packed, Int8Rows | Fp8Rows):
            return self._in_pieces(packed, x)
        return linear(packed, x)

    def _in_pieces(self, packed: Int8Rows | Fp8Rows, x: Tensor) -> Tensor:
        """As `linear`, with no more than PIECE_BYTES of converted weights at a time."""
        out = torch.empty(x.shape[0], packed.out_features, dtype=x.dtype, device=x.device)
        rows = max(1, PIECE_BYTES // (packed.weight.shape[1] * x.element_size()))
        for begin in range(0, packed.out_features, rows):
            piece = slice(begin, begin + rows)
            out[:, piece] = functional.linear(x, packed.weight[piece].to(x.dtype)) * packed.scale[piece]
        return out

    def warm_up(self, weights: TextWeights) -> None:
        """Compile what a prompt of any length may need, so that no request waits for it: one product of every kind."""
        kinds = {(matrix.key, matrix.scale is None): matrix for matrix, _ in uses_of(weights)}
        for matrix in kinds.values():
            for rows in TILES:
                self._few(matrix, torch.zeros(rows, matrix.in_features, dtype=weights.dtype, device=weights.device))
            if matrix.group:
                dequantize_int4(matrix, weights.dtype)

    def _few(self, matrix: Matrix, x: Tensor) -> Tensor:
        blocks = self._tuning.blocks(matrix)
        dtype = x.dtype if blocks.splits == 1 else torch.float32
        out = torch.empty(blocks.splits, x.shape[0], matrix.out_features, dtype=dtype, device=x.device)
        multiply(matrix, x, out, blocks)
        return out[0] if blocks.splits == 1 else out.sum(0).to(x.dtype)
