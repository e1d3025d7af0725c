# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""y = x · Wᵀ for few rows of x, where the time is that of reading W: a kernel for rowwise formats; int4: `triton_int4`.

Weights are read once for all rows, converted in registers and multiplied on the matrix units. Tiles have 8, 16, 32 or 64
rows, absent ones masked, and every sum has one order whatever the tile: a row's result does not depend on its neighbours.
Thin matrices are split along the input into partial results that the next kernel adds in order (`splits`); nothing is atomic.

int8 and fp8 lie as in the checkpoint, with one scale per row. int4 lies as `Int4Halves`, so that a tile of bytes is two
tiles of weights without moving anything between threads, and both meet neighbouring activations.

A decode step's tile has two warps at most: such products run on `mma.sync`, whose sums are the same for every number of rows.
From 64 outputs and four warps on Triton takes Hopper's `wgmma`, whose sums were measured to depend on it: for prefill alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from gemma_opt.engine.kernels.triton_int4 import dequantize_kernel, int4_kernel
from gemma_opt.engine.kernels.triton_overlap import overlaps, start_next, wait
from gemma_opt.engine.kernels.triton_tiles import begin_tile, finish_tile, outputs_of_tile
from gemma_opt.recipe import Activation

LEAST_ROWS = 8  # the smallest tile of the matrix units: 1 to 8 rows cost the same
LEAST_STAGES = 2  # of a pipeline: a tile is under way while another is multiplied
FEW_ROWS = 16  # up to here a step is bound by reading the weights
AHEAD = 2**14  # bytes that a program has fetched into the L2 cache while it waits for its input
MOST_ROWS = 64  # rows of a decode step's tile; more are several tiles, which read the weights again (from the L2 cache)


@dataclass(frozen=True)
class Blocks:
    """How one matrix is cut up. outputs × inputs: the tile of a program and step; splits: programs along the inputs.

    outputs are rows of the weight: of a gated product half are gate and half up. rows: of activations in a tile, at most.
    int4 has its own inputs: a block of its layout.
    """

    outputs: int = 32
    inputs: int = 256
    splits: int = 1
    warps: int = 2
    stages: int = 4
    rows: int = MOST_ROWS


@dataclass(frozen=True)
class Matrix:
    """A stored matrix [out, in] of any format, as the kernels read it.

    weight: float, int8 or fp8 [out, in], or (group > 0) the bytes of `Int4Halves`. scale: float32 [out]; None for float
    weights; for int4 its steps, int32 [groups, out]. activation, input_scale: of its inputs, see `GridInput`.
    """

    weight: Tensor
    in_features: int
    scale: Tensor | None = None
    group: int = 0
    half: int = 0
    activation: Activation = "none"
    input_scale: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.weight.shape[0]

    @property
    def row_bytes(self) -> int:
        """Of the weights of one row."""
        return self.weight.shape[1] * self.weight.element_size()

    @property
    def bytes(self) -> int:
        """What one product has to read."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def key(self) -> str:
        """Names everything that decides which blocks are best for a number of rows."""
        kind = f"int4g{self.group}" if self.group else str(self.weight.dtype)[6:]
        return f"{kind}:{self.out_features}x{self.in_features}"


@triton.jit
def _rowwise_tile(weight, o, k, mask, in_features: tl.constexpr, operand: tl.constexpr):
    """Float, int8 or fp8 weights [outputs, inputs] in the operands' dtype, not scaled."""
    w = tl.load(weight + o[:, None].to(tl.int64) * in_features + k[None, :], mask=mask, other=0.0)
    if w.dtype.is_fp8():  # the direct way to bfloat16 does not compile for GPUs before Hopper
        w = w.to(tl.float32)
    return w.to(operand)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(x, x_scale, weight, scale, out, rows, out_features: tl.constexpr, in_features: tl.constexpr,
                   gated: tl.constexpr, has_x_scale: tl.constexpr, has_scale: tl.constexpr, operand: tl.constexpr,
                   splits: tl.constexpr, block_rows: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr,
                   early: tl.constexpr, row_bytes: tl.constexpr, ahead: tl.constexpr, threads: tl.constexpr):  # fmt: skip
    """One tile of out: [splits, rows, out_features]. gated: W holds gate over up, and out is gelu(gate) · up."""
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    o, inside = outputs_of_tile(out_features, gated, block_out)
    split = tl.program_id(2)
    steps: tl.constexpr = (in_features + block_in * splits - 1) // (block_in * splits)
    even: tl.constexpr = in_features % (block_in * splits) == 0
    if has_scale:  # here and not where they are needed: at the end the program would wait for them
        scales = tl.load(scale + o, mask=inside, other=0.0)[:, None]
    acc = tl.zeros((block_out, block_rows), tl.float32)
    if steps == 1 and even:  # all of a program's weights are under way before it waits
        start_next(early)
        k = split * block_in + tl.arange(0, block_in // 2)
        first = _rowwise_tile(weight, o, k, inside[:, None], in_features, operand)
        second = _rowwise_tile(weight, o, k + block_in // 2, inside[:, None], in_features, operand)
        wait(early)
        place = x + r[None, :] * in_features + k[:, None]
        values = tl.load(place, mask=r[None, :] < rows, other=0.0).to(operand)
        more_values = tl.load(place + block_in // 2, mask=r[None, :] < rows, other=0.0).to(operand)
        more = tl.zeros((block_out, block_rows), tl.float32)  # apart: products that need not wait for each other
        acc = tl.dot(first, values, acc, input_precision="ieee") + tl.dot(second, more_values, more, input_precision="ieee")
    else:
        begin_tile(weight, split, out_features, gated, splits, block_out, early, row_bytes, ahead, threads)
        for step in range(steps):
            k = (split * steps + step) * block_in + tl.arange(0, block_in)
            w_mask = inside[:, None]
            x_mask = r[None, :] < rows
            if not even:
                w_mask = w_mask & (k[None, :] < in_features)
                x_mask = x_mask & (k[:, None] < in_features)
            values = tl.load(x + r[None, :] * in_features + k[:, None], mask=x_mask, other=0.0).to(operand)
            acc = tl.dot(_rowwise_tile(weight, o, k, w_mask, in_features, operand), values, acc, input_precision="ieee")
    if has_scale:
        acc = acc * scales
    finish_tile(acc, out, x_scale, r, split, rows, out_features, gated, has_x_scale, block_out, block_rows)


def multiply(
    matrix: Matrix,
    x: Tensor,
    out: Tensor,
    blocks: Blocks,
    *,
    x_scale: Tensor | None = None,
    gated: bool = False,
    compile_only: bool = False,
) -> None:
    """Fill out with x · Wᵀ.

    x: [rows, in], contiguous. out: [splits, rows, out_features], whose sum over splits is the result; gated (splits = 1):
    [1, rows, out_features / 2], gelu(gate) · up, where W is gate over up. Products of bfloat16 activations are those of
    bfloat16 operands summed in float32; float32 activations compute in float32. x_scale: float32 [rows], by which results
    are multiplied: x are steps then (`settle`). compile_only: launch nothing.
    """
    splits, rows, width = out.shape
    if splits != blocks.splits or (gated and splits != 1):
        raise ValueError(f"out has {splits} partial results, the blocks make {blocks.splits}, gated ones 1")
    early = overlaps(x)
    block_rows, stages = fit(matrix, blocks, tile_rows(rows, blocks.rows), x.dtype, _shared_memory(x.device))
    kernel = int4_kernel if matrix.group else _linear_kernel
    own: dict[str, int] = (
        {"group": matrix.group, "half": matrix.half}
        if matrix.group
        else {"has_scale": matrix.scale is not None, "block_in": blocks.inputs}
    )
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(width * (2 if gated else 1), blocks.outputs), splits)
    launch = partial(kernel.warmup, grid=grid) if compile_only else kernel[grid]
    launch(
        x, x if x_scale is None else x_scale, matrix.weight, x if matrix.scale is None else matrix.scale, out, rows,
        out_features=width, in_features=matrix.in_features, gated=gated, has_x_scale=x_scale is not None,
        operand=operand_of(x.dtype), splits=splits, block_rows=block_rows, block_out=blocks.outputs, early=early,
        row_bytes=matrix.row_bytes, ahead=_ahead(matrix.row_bytes, blocks) if early else 0, threads=32 * blocks.warps, **own,
        num_warps=blocks.warps, num_stages=stages, launch_pdl=early,
    )  # fmt: skip


def fit(matrix: Matrix, blocks: Blocks, rows: int, dtype: torch.dtype, memory: float) -> tuple[int, int]:
    """The rows of a tile and the stages with which a program fits `memory` bytes: fewer stages, then fewer rows.

    Neither changes a bit of the product. rows: of the tile that is wished for; dtype: of the activations.
    """
    stages = blocks.stages
    while stages > LEAST_STAGES and _held_bytes(matrix, blocks, rows, stages, dtype) > memory:
        stages -= 1
    while rows > LEAST_ROWS and _held_bytes(matrix, blocks, rows, stages, dtype) > memory:
        rows //= 2
    return rows, stages


def _held_bytes(matrix: Matrix, blocks: Blocks, rows: int, stages: int, dtype: torch.dtype) -> int:
    """What a program has in shared memory: the tiles under way, and one of weights that became float32."""
    inputs = 2 * matrix.half or blocks.inputs
    tile = blocks.outputs * inputs
    weights = tile // 2 + 4 * tile // matrix.group if matrix.group else tile * matrix.weight.element_size()
    under_way = max(1, stages - 1) * (weights + inputs * rows * dtype.itemsize)
    return under_way + (4 * tile if dtype == torch.float32 and matrix.weight.dtype != dtype else 0)


@cache
def _shared_memory(device: torch.device) -> float:
    """Bytes that one program may have: 99 KB on an L40S, 227 on an H100; on the interpreter without end."""
    if device.type != "cuda":
        return math.inf
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin")  # noqa: B009 torch's types lack it


def blocks_for(rows: int, blocks: Blocks, dtype: torch.dtype) -> Blocks:
    """The same blocks, less deep where so many rows of activations fill the shared memory."""
    if rows <= FEW_ROWS:
        return blocks
    return replace(blocks, inputs=min(blocks.inputs, 256), stages=3 if dtype.itemsize == 2 else 2)


def tile_rows(rows: int, most: int) -> int:
    """Rows of the tile that computes so many rows."""
    least = FEW_ROWS if knobs.runtime.interpret else LEAST_ROWS  # numpy's products do depend on the tile
    return min(most, max(least, 1 << (rows - 1).bit_length()))


def _ahead(row_bytes: int, blocks: Blocks) -> int:
    """Bytes of each row that a program has fetched before it may begin; pieces that the copy engine takes are of 16."""
    if row_bytes % (16 * blocks.splits):
        return 0
    return min(row_bytes // blocks.splits, AHEAD // blocks.outputs) // 16 * 16


def dequantize_int4(matrix: Matrix, dtype: torch.dtype, rows: slice) -> Tensor:
    """Some rows of the weight of an int4 matrix, [rows, in] in `dtype`, without a copy in between."""
    weight, steps = matrix.weight[rows], matrix.weight if matrix.scale is None else matrix.scale[:, rows]
    out = torch.empty(len(weight), matrix.in_features, dtype=dtype, device=weight.device)
    dequantize_kernel[(triton.cdiv(len(weight), 32), matrix.row_bytes // matrix.half)](
        weight, steps, out, len(weight), stride=matrix.out_features, in_features=matrix.in_features, group=matrix.group,
        half=matrix.half, row_bytes=matrix.row_bytes, operand=operand_of(dtype), block_out=32, num_warps=4,
    )  # fmt: skip
    return out


def operand_of(dtype: torch.dtype) -> tl.dtype:
    """What products of such activations are computed in. The CPU interpreter has no bfloat16 arithmetic."""
    narrow = dtype == torch.bfloat16 and not knobs.runtime.interpret
    return tl.bfloat16 if narrow else tl.float32
