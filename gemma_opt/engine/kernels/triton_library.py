"""Products of many rows, where the arithmetic takes the time: the vendor's library on weights converted for the moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.engine.kernels.triton_linear import Matrix, dequantize_int4

LEAST_INTEGER_ROWS = 17  # the library refuses fewer
PIECE_BYTES = 32 * 2**20  # of converted weights at a time: a 4B model's largest matrix is 105 MB in bfloat16


def multiply_by_library(matrix: Matrix, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
    """x · Wᵀ in x's dtype. x: [rows, in], or with x_scale, float32 [rows], its steps."""
    if x_scale is not None and _are_integers(matrix, x):
        return _multiply_integers(matrix, x, x_scale)
    if x_scale is not None:
        return multiply_by_library(matrix, x).mul_(x_scale[:, None])
    if matrix.scale is None:
        return functional.linear(x, matrix.weight)
    out = torch.empty(x.shape[0], matrix.out_features, dtype=x.dtype, device=x.device)
    outputs = _outputs_at_once(matrix.in_features * x.element_size())
    for begin in range(0, matrix.out_features, outputs):
        piece = slice(begin, min(begin + outputs, matrix.out_features))
        if matrix.group:
            out[:, piece] = functional.linear(x, dequantize_int4(matrix, x.dtype, piece))
        else:
            out[:, piece] = functional.linear(x, matrix.weight[piece].to(x.dtype)).mul_(matrix.scale[piece])
    return out


def _outputs_at_once(output_bytes: int) -> int:
    """Outputs of a piece: a multiple of 8, which the integer product asks for and which keeps rows of results aligned."""
    return max(8, PIECE_BYTES // output_bytes // 8 * 8)


def _are_integers(matrix: Matrix, steps: Tensor) -> bool:
    """Whether the integer units take weights and steps as they are."""
    whole = matrix.weight.dtype == torch.int8 and matrix.activation.startswith("int8")
    return whole and steps.shape[0] >= LEAST_INTEGER_ROWS and matrix.in_features % 8 == 0 and matrix.out_features % 8 == 0


def _multiply_integers(matrix: Matrix, steps: Tensor, x_scale: Tensor) -> Tensor:
    narrow, scale = steps.to(torch.int8), cast(Tensor, matrix.scale)
    out = torch.empty(steps.shape[0], matrix.out_features, dtype=steps.dtype, device=steps.device)
    outputs = _outputs_at_once(4 * steps.shape[0])  # of sums
    multiply: Callable[[Tensor, Tensor], Tensor] = getattr(torch, "_int_mm")  # noqa: B009 not among torch's types
    for begin in range(0, matrix.out_features, outputs):
        piece = slice(begin, begin + outputs)
        out[:, piece] = multiply(narrow, matrix.weight[piece].T).float().mul_(scale[piece]).mul_(x_scale[:, None])
    return out
