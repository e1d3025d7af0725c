"""Products of many rows, where the arithmetic takes the time: the vendor's library on weights converted for the moment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.engine.kernels.triton_linear import Matrix, dequantize_int4

LEAST_INTEGER_ROWS = 17  # the library refuses fewer
PIECE_BYTES = 32 * 2**20  # of converted weights at a time: a 4B model's largest matrix is 105 MB in bfloat16


def multiply_by_library(matrix: Matrix, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
    """x · Wᵀ in x's dtype. x: [rows, in], or with x_scale, float32 [rows], its steps."""
    if x_scale is not None:
        return (_integers(matrix, x) * x_scale[:, None]).to(x.dtype)
    if matrix.scale is None:
        return functional.linear(x, matrix.weight)
    out = torch.empty(x.shape[0], matrix.out_features, dtype=x.dtype, device=x.device)
    rows = max(1, PIECE_BYTES // (matrix.in_features * x.element_size()))
    for begin in range(0, matrix.out_features, rows):
        piece = slice(begin, min(begin + rows, matrix.out_features))
        if matrix.group:
            out[:, piece] = functional.linear(x, dequantize_int4(matrix, x.dtype, piece))
        else:
            out[:, piece] = functional.linear(x, matrix.weight[piece].to(x.dtype)).mul_(matrix.scale[piece])
    return out


def _integers(matrix: Matrix, steps: Tensor) -> Tensor:
    """The product with steps: on the integer units, without converting the weights, where steps and weights are int8."""
    whole = matrix.weight.dtype == torch.int8 and matrix.activation.startswith("int8")
    sizes = steps.shape[0] >= LEAST_INTEGER_ROWS and matrix.in_features % 8 == 0 and matrix.out_features % 8 == 0
    if whole and sizes and matrix.scale is not None:
        product: Tensor = getattr(torch, "_int_mm")(steps.to(torch.int8), matrix.weight.T)  # noqa: B009 not among torch's types
        return product * matrix.scale
    return multiply_by_library(matrix, steps)
