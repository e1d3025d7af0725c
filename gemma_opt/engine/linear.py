"""A packed linear applied to activations, and a chunk's attention: the seam where a device's kernels are picked.

What stands here runs anywhere, in plain torch operations, and is what the kernels are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, singledispatch

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


@dataclass(frozen=True)
class Visible:
    """Which keys each token of a chunk sees: those of indices begin ≤ i < end. int64 [tokens], begin < end."""

    begin: Tensor
    end: Tensor

    @cached_property
    def mask(self) -> Tensor:
        """bool [tokens, keys], up to the last key that is seen."""
        keys = torch.arange(int(self.end.max()), device=self.end.device)
        return (keys >= self.begin[:, None]) & (keys < self.end[:, None])


def attend_to_chunk(query: Tensor, keys: Tensor, values: Tensor, visible: Visible, scale: float) -> Tensor:
    """Softmax attention, heads in groups that share keys. query: [tokens, heads, head_dim], which is returned too.

    keys, values: [kv_heads, keys, head_dim], the last of which somebody sees.
    """
    out = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], attn_mask=visible.mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def rows_of(table: FloatRows | Int8Rows, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The table's rows of `ids` [tokens], gathered first and then scaled: [tokens, in] in `dtype`."""
    rows = table.weight[ids]
    return rows.to(dtype) if isinstance(table, FloatRows) else (rows * table.scale[ids, None]).to(dtype)


def rms_norm(x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """x / RMS(x) · factor over the last dimension, computed in float32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * factor).to(x.dtype)
