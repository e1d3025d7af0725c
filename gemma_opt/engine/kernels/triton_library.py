"""Products of many rows, where the arithmetic takes the time: the vendor's library on weights converted for the moment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.engine.kernels.triton_linear import Matrix, dequantize_int4

PIECE_BYTES = 32 * 2**20  # of converted weights at a time: a 4B model's largest matrix is 105 MB in bfloat16


def multiply_by_library(matrix: Matrix, x: Tensor) -> Tensor:
    """x · Wᵀ in x's dtype. x: [rows, in]."""
    if matrix.scale is None:
        return functional.linear(x, matrix.weight)
    if matrix.group:
        return functional.linear(x, dequantize_int4(matrix, x.dtype))
    out = torch.empty(x.shape[0], matrix.out_features, dtype=x.dtype, device=x.device)
    rows = max(1, PIECE_BYTES // (matrix.in_features * x.element_size()))
    for begin in range(0, matrix.out_features, rows):
        piece = slice(begin, begin + rows)
        out[:, piece] = functional.linear(x, matrix.weight[piece].to(x.dtype)).mul_(matrix.scale[piece])
    return out
