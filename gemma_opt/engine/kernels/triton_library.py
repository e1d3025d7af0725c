"""Products of many rows, where the arithmetic takes the time: the vendor's library on weights converted for the moment."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.engine.kernels.triton_linear import Matrix, dequantize_int4
from gemma_opt.engine.kernels.triton_rows import finish, widen

LEAST_INTEGER_ROWS = 17  # the library refuses fewer
TILE = 128  # outputs of the library's tiles, mostly
PIECE_BYTES = 32 * 2**20  # of converted weights at a time: a 4B model's largest matrix is 105 MB in bfloat16


def multiply_by_library(
    matrix: Matrix, x: Tensor, x_scale: Tensor | None = None, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """x · Wᵀ + bias, or its GELU, in x's dtype. x: [rows, in], or with x_scale, float32 [rows], its steps; bias: [out]."""
    if matrix.scale is None and x_scale is None and not gelu:
        return functional.linear(x, matrix.weight, bias)
    out = torch.empty(x.shape[0], matrix.out_features, dtype=x.dtype, device=x.device)
    if x_scale is not None and _are_integers(matrix, x):
        _multiply_integers(matrix, x, x_scale, bias, out, gelu=gelu)
        return out
    outputs = _outputs_at_once(matrix.in_features * x.element_size())
    for piece in _pieces(matrix, outputs):
        torch.mm(x, _widened(matrix, x.dtype, piece).T, out=out[:, piece])
    scale = None if matrix.group else matrix.scale
    if any(factor is not None for factor in (scale, x_scale, bias)) or gelu:
        finish(out, out, scale=scale, x_scale=x_scale, bias=bias, gelu=gelu)
    return out


def _widened(matrix: Matrix, dtype: torch.dtype, outputs: slice) -> Tensor:
    """Some rows of the weight in `dtype`; those of int8 and fp8 not scaled."""
    if matrix.group:
        return dequantize_int4(matrix, dtype, outputs)
    return matrix.weight[outputs] if matrix.scale is None else widen(matrix.weight[outputs], dtype)


def _pieces(matrix: Matrix, most: int) -> list[slice]:
    """Of `most` outputs at most, and about equal: a last one of few would take as long as a whole one."""
    count = -(-matrix.out_features // most)
    outputs = min(most, -(-matrix.out_features // (count * TILE)) * TILE)
    return [slice(begin, min(begin + outputs, matrix.out_features)) for begin in range(0, matrix.out_features, outputs)]


def _outputs_at_once(output_bytes: int) -> int:
    """Outputs of a piece: a multiple of 16, so that rows of results are aligned and all pieces meet one compiled `finish`."""
    return max(16, PIECE_BYTES // output_bytes // 16 * 16)


def _are_integers(matrix: Matrix, steps: Tensor) -> bool:
    """Whether the integer units take weights and steps as they are."""
    whole = matrix.weight.dtype == torch.int8 and matrix.activation.startswith("int8")
    return whole and steps.shape[0] >= LEAST_INTEGER_ROWS and matrix.in_features % 8 == 0 and matrix.out_features % 8 == 0


def _multiply_integers(matrix: Matrix, steps: Tensor, x_scale: Tensor, bias: Tensor | None, out: Tensor, *, gelu: bool) -> None:
    narrow = steps.to(torch.int8)
    multiply: Callable[[Tensor, Tensor], Tensor] = getattr(torch, "_int_mm")  # noqa: B009 not among torch's types
    for piece in _pieces(matrix, _outputs_at_once(4 * steps.shape[0])):  # of sums
        scale, piece_bias = (None if part is None else part[piece] for part in (matrix.scale, bias))
        finish(
            multiply(narrow, matrix.weight[piece].T), out[:, piece], scale=scale, x_scale=x_scale, bias=piece_bias, gelu=gelu
        )
