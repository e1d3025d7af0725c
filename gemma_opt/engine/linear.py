"""A packed linear applied to activations: the seam where a kernel is picked by format, device and number of rows.

What stands here runs anywhere, in plain torch operations, and is what the kernels are compared with.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor
from torch.nn import functional

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
from gemma_opt.quantization import quantize_input


@singledispatch
def linear(packed: PackedLinear, x: Tensor) -> Tensor:
    """x: [rows, in], float. Returns [rows, out] in x's dtype."""
    raise TypeError(f"no linear for a {type(packed).__name__}")


@linear.register
def _(packed: FloatRows, x: Tensor) -> Tensor:
    return functional.linear(x, packed.weight)


@linear.register(Int8Rows)
@linear.register(Fp8Rows)
def _(packed: Int8Rows | Fp8Rows, x: Tensor) -> Tensor:
    return functional.linear(x, packed.weight.to(x.dtype)).mul_(packed.scale)


@linear.register(Int4Rows)
@linear.register(Int4Halves)
def _(packed: Int4Rows | Int4Halves, x: Tensor) -> Tensor:
    return functional.linear(x, packed.dequantize().to(x.dtype))


@linear.register
def _(packed: GridInput, x: Tensor) -> Tensor:
    steps, scale = quantize_input(x, packed.activation, packed.input_scale)
    y = linear(packed.rows, steps)
    return y if scale is None else (y * scale).to(x.dtype)


@linear.register
def _(packed: LowRankRows, x: Tensor) -> Tensor:
    return linear(packed.left, linear(packed.right, x))


@linear.register
def _(packed: Stacked, x: Tensor) -> Tensor:
    return torch.cat([linear(part, x) for part in packed.parts], dim=-1)


def rows_of(table: FloatRows | Int8Rows, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The table's rows of `ids` [tokens], gathered first and then scaled: [tokens, in] in `dtype`."""
    rows = table.weight[ids]
    return rows.to(dtype) if isinstance(table, FloatRows) else (rows * table.scale[ids, None]).to(dtype)


def rms_norm(x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """x / RMS(x) · factor over the last dimension, computed in float32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * factor).to(x.dtype)
