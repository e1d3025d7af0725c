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
    """Which keys each token of a chunk sees: those of indices begin ≤ i < end. int64 [tokens], begin < end.

    group: heads that share keys; dtype: of the activations.
    """

    begin: Tensor
    end: Tensor
    group: int
    dtype: torch.dtype

    @cached_property
    def bias(self) -> Tensor:
        """0 where a token sees and −∞ where not: [tokens · group, keys], up to the last key that is seen.

        Made once for all layers.
        """
        keys = torch.arange(int(self.end.max()), device=self.end.device)
        mask = (keys >= self.begin[:, None]) & (keys < self.end[:, None])
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, -torch.inf).repeat_interleave(self.group, 0)


def attend_to_chunk(query: Tensor, keys: Tensor, values: Tensor, visible: Visible, scale: float) -> Tensor:
    """Softmax attention, heads in groups that share keys. query: [tokens, heads, head_dim], which is returned too.

    keys, values: [kv_heads, keys, head_dim], the last of which somebody sees.

    Heads that share keys are rows of one head: so no keys are repeated, and torch takes a fused kernel, which it does not for
    grouped heads with a mask.
    """
    tokens, heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    rows = query.reshape(tokens, kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
    out = functional.scaled_dot_product_attention(rows[None], keys[None], values[None], attn_mask=visible.bias, scale=scale)[0]
    return out.view(kv_heads, tokens, -1, head_dim).transpose(0, 1).reshape(tokens, heads, head_dim)


def gated_gelu(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up, [rows, channels], of the two side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def rows_of(table: FloatRows | Int8Rows, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The table's rows of `ids` [tokens], gathered first and then scaled: [tokens, in] in `dtype`."""
    rows = table.weight[ids]
    return rows.to(dtype) if isinstance(table, FloatRows) else (rows * table.scale[ids, None]).to(dtype)


def rms_norm(x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """x / RMS(x) · factor over the last dimension, computed in float32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * factor).to(x.dtype)
