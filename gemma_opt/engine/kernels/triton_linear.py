# pyright: basic, reportCallIssue=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""y = x · Wᵀ for few rows of x, where the time is that of reading W: one kernel for every stored format.

Weights are read once for all rows, converted in registers and multiplied on the matrix units. Tiles have 8, 16, 32 or 64
rows, absent ones masked, and every sum has one order whatever the tile: a row's result does not depend on its neighbours. Thin
matrices are split along the input into partial results that the next kernel adds in order (`splits`); nothing is atomic.

Layouts are the checkpoint's: int8 and fp8 with one scale per row; int4 two columns a byte, the even one in the low nibble,
with one scale (and zero point) per group of columns. Without zero points the stored nibble is the value plus 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from gemma_opt.engine.kernels.triton_overlap import overlaps, prefetch_rows, wait_for_input

LEAST_ROWS = 8  # the smallest tile of the matrix units: 1 to 8 rows cost the same
FEW_ROWS = 16  # up to here a step is bound by reading the weights
AHEAD = 2**16  # bytes that a program has fetched into the L2 cache while it waits for its input
MOST_ROWS = 64  # rows of one tile; more than that are several tiles, which read the weights again (from the L2 cache)


@dataclass(frozen=True)
class Blocks:
    """How one matrix is cut up. outputs × inputs: the tile of a program and step; splits: programs along the inputs."""

    outputs: int = 64
    inputs: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class Matrix:
    """A stored matrix [out, in] of any format, as the kernel reads it.

    weight: float, int8 or fp8 [out, in], or (group > 0) uint8 [out, in / 2]. scale: [out] or [out, in / group]; None for
    float weights. zero: uint8 [out, in / group] of asymmetric int4.
    """

    weight: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    group: int = 0

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Length of x."""
        return self.weight.shape[1] * (2 if self.group else 1)

    @property
    def row_bytes(self) -> int:
        """Of the weights of one row."""
        return self.weight.shape[1] * self.weight.element_size()

    @property
    def bytes(self) -> int:
        """What one product has to read."""
        return sum(part.nbytes for part in (self.weight, self.scale, self.zero) if part is not None)

    @property
    def key(self) -> str:
        """Names everything that decides which blocks are best, but not the number of rows: that must not matter."""
        kind = f"int4g{self.group}{'z' if self.zero is not None else ''}" if self.group else str(self.weight.dtype)[6:]
        return f"{kind}:{self.out_features}x{self.in_features}"


@triton.jit
def _rowwise_tile(weight, o, k, mask, in_features: tl.constexpr, operand: tl.constexpr):
    """Float, int8 or fp8 weights [outputs, inputs] in the operands' dtype, not scaled."""
    w = tl.load(weight + o[:, None].to(tl.int64) * in_features + k[None, :], mask=mask, other=0.0)
    if w.dtype.is_fp8():  # the direct way to bfloat16 does not compile for GPUs before Hopper
        w = w.to(tl.float32)
    return w.to(operand)


@triton.jit
def _int4_tile(weight, scale, zero, o, first, outputs, in_features: tl.constexpr, even: tl.constexpr, operand: tl.constexpr,
               group: tl.constexpr, has_zero: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr):  # fmt: skip
    """Scaled int4 weights [outputs, inputs].

    (nibble - zero) is exact in bfloat16 and its product with the scale rounded once, as in a dequantized bfloat16 matrix.
    One byte's two columns are neighbours again before the product, so that activations are read in order, in wide loads.
    """
    groups: tl.constexpr = block_in // group
    byte = first // 2 + tl.arange(0, block_in // 2)
    g = first // group + tl.arange(0, groups)
    byte_mask = o[:, None] < outputs
    group_mask = byte_mask
    if not even:
        byte_mask = byte_mask & (byte[None, :] < in_features // 2)
        group_mask = group_mask & (g[None, :] < in_features // group)
    row = o[:, None].to(tl.int64)
    packed = tl.load(weight + row * (in_features // 2) + byte[None, :], mask=byte_mask, other=0)
    s = tl.load(scale + row * (in_features // group) + g[None, :], mask=group_mask, other=0.0).to(operand)
    s = tl.reshape(tl.broadcast_to(s[:, :, None], (block_out, groups, group // 2)), (block_out, block_in // 2))
    if has_zero:
        z = tl.load(zero + row * (in_features // group) + g[None, :], mask=group_mask, other=0).to(tl.int8)
        z = tl.reshape(tl.broadcast_to(z[:, :, None], (block_out, groups, group // 2)), (block_out, block_in // 2))
    else:
        z = tl.full((block_out, block_in // 2), 8, tl.int8)
    low = ((packed & 15).to(tl.int8) - z).to(operand) * s
    high = ((packed >> 4).to(tl.int8) - z).to(operand) * s
    return tl.interleave(low, high)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(x, weight, scale, zero, out, rows, out_features: tl.constexpr, in_features: tl.constexpr,
                   gated: tl.constexpr, has_scale: tl.constexpr, has_zero: tl.constexpr, group: tl.constexpr,
                   operand: tl.constexpr, splits: tl.constexpr, block_rows: tl.constexpr, block_out: tl.constexpr,
                   block_in: tl.constexpr, early: tl.constexpr, row_bytes: tl.constexpr, ahead: tl.constexpr,
                   threads: tl.constexpr):  # fmt: skip
    """One tile of out: [splits, rows, out_features]. gated: W holds gate over up, and out is gelu(gate) · up."""
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    o = tl.program_id(1) * block_out + tl.arange(0, block_out)
    split = tl.program_id(2)
    steps: tl.constexpr = (in_features + block_in * splits - 1) // (block_in * splits)
    even: tl.constexpr = in_features % (block_in * splits) == 0
    if ahead:
        bytes_ = weight.to(tl.pointer_type(tl.uint8))
        begin = split * (row_bytes // splits)
        prefetch_rows(bytes_, tl.program_id(1) * block_out, out_features, row_bytes, begin, ahead, block_out, threads)
        if gated:
            above_bytes = bytes_ + out_features * row_bytes
            prefetch_rows(above_bytes, tl.program_id(1) * block_out, out_features, row_bytes, begin, ahead, block_out, threads)
    wait_for_input(early)
    acc = tl.zeros((block_out, block_rows), tl.float32)
    above = tl.zeros((block_out, block_rows), tl.float32)
    for step in range(steps):
        first = (split * steps + step) * block_in
        k = first + tl.arange(0, block_in)
        w_mask = o[:, None] < out_features
        x_mask = r[None, :] < rows
        if not even:
            w_mask = w_mask & (k[None, :] < in_features)
            x_mask = x_mask & (k[:, None] < in_features)
        values = tl.load(x + r[None, :] * in_features + k[:, None], mask=x_mask, other=0.0).to(operand)
        if group:
            w = _int4_tile(weight, scale, zero, o, first, out_features, in_features, even, operand, group, has_zero,
                           block_out, block_in)  # fmt: skip
        else:
            w = _rowwise_tile(weight, o, k, w_mask, in_features, operand)
        acc = tl.dot(w, values, acc, input_precision="ieee")
        if gated:
            if group:
                shift: tl.constexpr = out_features * (in_features // group)
                w = _int4_tile(weight + out_features * (in_features // 2), scale + shift, zero + shift, o, first, out_features,
                               in_features, even, operand, group, has_zero, block_out, block_in)  # fmt: skip
            else:
                w = _rowwise_tile(weight + out_features * in_features, o, k, w_mask, in_features, operand)
            above = tl.dot(w, values, above, input_precision="ieee")
    if has_scale and not group:
        acc = acc * tl.load(scale + o, mask=o < out_features, other=0.0).to(tl.float32)[:, None]
        if gated:
            above = above * tl.load(scale + out_features + o, mask=o < out_features, other=0.0).to(tl.float32)[:, None]
    if gated:  # rounded where separate modules would round
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
        acc = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))  # gelu's tanh form; 2·√(2/π)
        acc = acc.to(out.dtype.element_ty).to(tl.float32) * above.to(out.dtype.element_ty).to(tl.float32)
    place = (split * rows + r)[None, :] * out_features + o[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(r[None, :] < rows) & (o[:, None] < out_features))


@triton.jit
def _dequantize_kernel(weight, scale, zero, out, out_features: tl.constexpr, in_features: tl.constexpr,
                       group: tl.constexpr, has_zero: tl.constexpr, operand: tl.constexpr, block_out: tl.constexpr,
                       block_in: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * block_out + tl.arange(0, block_out)
    first = tl.program_id(1) * block_in
    k = first + tl.arange(0, block_in)
    w = _int4_tile(weight, scale, zero, o, first, out_features, in_features, in_features % block_in == 0, operand, group,
                   has_zero, block_out, block_in)  # fmt: skip
    mask = (o[:, None] < out_features) & (k[None, :] < in_features)
    tl.store(out + o[:, None].to(tl.int64) * in_features + k[None, :], w.to(out.dtype.element_ty), mask=mask)


def multiply(
    matrix: Matrix, x: Tensor, out: Tensor, blocks: Blocks, *, gated: bool = False, compile_only: bool = False
) -> None:
    """Fill out with x · Wᵀ.

    x: [rows, in], contiguous. out: [splits, rows, out_features], whose sum over splits is the result; gated (splits = 1):
    [1, rows, out_features / 2], gelu(gate) · up, where W is gate over up. Products of bfloat16 activations are those of
    bfloat16 operands summed in float32; float32 activations compute in float32. compile_only: launch nothing.
    """
    splits, rows, width = out.shape
    if splits != blocks.splits or (gated and splits != 1):
        raise ValueError(f"out has {splits} partial results, the blocks make {blocks.splits}, gated ones 1")
    early = overlaps(x)
    block_in = max(blocks.inputs, matrix.group)
    least = FEW_ROWS if knobs.runtime.interpret else LEAST_ROWS  # numpy's products do depend on the tile
    block_rows = min(MOST_ROWS, max(least, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(width, blocks.outputs), splits)
    launch = partial(_linear_kernel.warmup, grid=grid) if compile_only else _linear_kernel[grid]
    launch(
        x, matrix.weight, _given(matrix.scale, x), _given(matrix.zero, x), out, rows,
        out_features=width, in_features=matrix.in_features, gated=gated, has_scale=matrix.scale is not None,
        has_zero=matrix.zero is not None, group=matrix.group, operand=operand_of(x.dtype), splits=splits,
        block_rows=block_rows, block_out=blocks.outputs, block_in=block_in, early=early, row_bytes=matrix.row_bytes,
        ahead=_ahead(matrix.row_bytes, blocks) if early else 0, threads=32 * blocks.warps,
        num_warps=blocks.warps, num_stages=blocks.stages, launch_pdl=early,
    )  # fmt: skip


def _ahead(row_bytes: int, blocks: Blocks) -> int:
    """Bytes of each row that a program has fetched before it may begin; pieces that the copy engine takes are of 16."""
    if row_bytes % (16 * blocks.splits):
        return 0
    return min(row_bytes // blocks.splits, AHEAD // blocks.outputs) // 16 * 16


def dequantize_int4(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of an int4 matrix in `dtype`, without a copy in between."""
    out = torch.empty(matrix.out_features, matrix.in_features, dtype=dtype, device=matrix.weight.device)
    block_in = max(128, matrix.group)
    _dequantize_kernel[(triton.cdiv(matrix.out_features, 32), triton.cdiv(matrix.in_features, block_in))](
        matrix.weight, matrix.scale, _given(matrix.zero, out), out, out_features=matrix.out_features,
        in_features=matrix.in_features, group=matrix.group, has_zero=matrix.zero is not None, operand=operand_of(dtype),
        block_out=32, block_in=block_in, num_warps=4,
    )  # fmt: skip
    return out


def operand_of(dtype: torch.dtype) -> tl.dtype:
    """What products of such activations are computed in. The CPU interpreter has no bfloat16 arithmetic."""
    narrow = dtype == torch.bfloat16 and not knobs.runtime.interpret
    return tl.bfloat16 if narrow else tl.float32


def _given(part: Tensor | None, instead: Tensor) -> Tensor:
    """A kernel's pointer must point somewhere, also where it is never followed."""
    return instead if part is None else part
