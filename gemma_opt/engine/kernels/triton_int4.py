# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""Products with int4 weights that lie as `Int4Halves`: a tile of bytes is two tiles of weights, low and high nibbles.

Nothing moves between threads: bytes are loaded in the layout that the matrix units want, and nibbles become bfloat16 there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_opt.engine.kernels.triton_overlap import start_next, wait
from gemma_opt.engine.kernels.triton_tiles import begin_tile, finish_tile, outputs_of_tile


@triton.jit
def _nibbles(packed, operand: tl.constexpr):
    """128 + the low and 128 + the high nibbles of a tile of bytes, in the operands' dtype.

    bfloat16 128 to 143 are 0x4300 to 0x430F: a byte permutation, a shift at most and one logical operation a pair of weights.
    """
    if operand == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 one, two;
            prmt.b32 one, $4, 0, 0x4140;
            prmt.b32 two, $4, 0, 0x4342;
            lop3.b32 $0, one, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, two, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 one, one, 4;
            shr.u32 two, two, 4;
            lop3.b32 $2, one, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, two, 0x000F000F, 0x43004300, 0xEA;
            }""",
            "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low = (packed & 15).to(operand) + 128.0
        high = (packed >> 4).to(operand) + 128.0
    return low, high


@triton.jit
def _scaled(nibbles, steps, first_group, o, inside, stride: tl.constexpr, groups: tl.constexpr, group: tl.constexpr,
            operand: tl.constexpr, block_out: tl.constexpr):  # fmt: skip
    """(nibble - zero) · scale. nibbles: [outputs, groups · group], with 128 added, as the zero points have.

    The difference is exact, and its product rounded once, as in a dequantized bfloat16 matrix.
    """
    g = first_group + tl.arange(0, groups)
    words = tl.load(steps + g[None, :] * stride + o[:, None], mask=inside[:, None], other=0)
    if operand == tl.bfloat16:
        s = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
        z = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        s = (words << 16).to(tl.float32, bitcast=True)
        z = (words & -65536).to(tl.float32, bitcast=True)
    s = tl.reshape(tl.broadcast_to(s[:, :, None], (block_out, groups, group)), (block_out, groups * group))
    z = tl.reshape(tl.broadcast_to(z[:, :, None], (block_out, groups, group)), (block_out, groups * group))
    return (nibbles - z) * s


@triton.jit(do_not_specialize=["rows"])
def int4_kernel(x, x_scale, weight, scale, out, rows, out_features: tl.constexpr, in_features: tl.constexpr,
                 gated: tl.constexpr, has_x_scale: tl.constexpr, group: tl.constexpr, half: tl.constexpr,
                 operand: tl.constexpr, splits: tl.constexpr, block_rows: tl.constexpr, block_out: tl.constexpr,
                 early: tl.constexpr, row_bytes: tl.constexpr, ahead: tl.constexpr, threads: tl.constexpr):  # fmt: skip
    """One tile of out: [splits, rows, out_features], as in `triton_linear`. scale: the steps of `Int4Halves`."""
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    o, inside = outputs_of_tile(out_features, gated, block_out)
    split = tl.program_id(2)
    blocks: tl.constexpr = row_bytes // half
    steps: tl.constexpr = (blocks + splits - 1) // splits
    even: tl.constexpr = blocks % splits == 0 and in_features == 2 * row_bytes
    groups: tl.constexpr = half // group
    stride: tl.constexpr = 2 * out_features if gated else out_features
    r_mask = r[None, :] < rows
    acc = tl.zeros((block_out, block_rows), tl.float32)
    acc_high = tl.zeros((block_out, block_rows), tl.float32)  # apart: products that need not wait for each other
    if steps == 1 and even:  # all of a program's weights are under way before it waits
        start_next(early)
        first = 2 * groups * split
        place = o[:, None].to(tl.int64) * row_bytes + (split * half + tl.arange(0, half))[None, :]
        low, high = _nibbles(tl.load(weight + place, mask=inside[:, None], other=0), operand)
        low = _scaled(low, scale, first, o, inside, stride, groups, group, operand, block_out)
        high = _scaled(high, scale, first + groups, o, inside, stride, groups, group, operand, block_out)
        wait(early)
        k = 2 * half * split + tl.arange(0, half)
        low_values = tl.load(x + r[None, :] * in_features + k[:, None], mask=r_mask, other=0.0).to(operand)
        high_values = tl.load(x + r[None, :] * in_features + half + k[:, None], mask=r_mask, other=0.0).to(operand)
        acc = tl.dot(low, low_values, acc, input_precision="ieee")
        acc_high = tl.dot(high, high_values, acc_high, input_precision="ieee")
    else:
        begin_tile(weight, split, out_features, gated, splits, block_out, early, row_bytes, ahead, threads)
        for step in range(steps):
            block = split * steps + step
            low_k = 2 * half * block + tl.arange(0, half)
            high_k = low_k + half
            low_mask, high_mask = r_mask, r_mask
            if not even:  # beyond the end activations are 0, whatever weights they meet
                low_mask = r_mask & (low_k[:, None] < in_features)
                high_mask = r_mask & (high_k[:, None] < in_features)
                block = tl.minimum(block, blocks - 1)
            low_values = tl.load(x + r[None, :] * in_features + low_k[:, None], mask=low_mask, other=0.0).to(operand)
            high_values = tl.load(x + r[None, :] * in_features + high_k[:, None], mask=high_mask, other=0.0).to(operand)
            place = o[:, None].to(tl.int64) * row_bytes + (block * half + tl.arange(0, half))[None, :]
            first = 2 * groups * block
            low, high = _nibbles(tl.load(weight + place, mask=inside[:, None], other=0), operand)
            low = _scaled(low, scale, first, o, inside, stride, groups, group, operand, block_out)
            high = _scaled(high, scale, first + groups, o, inside, stride, groups, group, operand, block_out)
            acc = tl.dot(low, low_values, acc, input_precision="ieee")
            acc_high = tl.dot(high, high_values, acc_high, input_precision="ieee")
    acc = acc + acc_high
    finish_tile(acc, out, x_scale, r, split, rows, out_features, gated, has_x_scale, block_out, block_rows)


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(weight, scale, out, rows, stride: tl.constexpr, in_features: tl.constexpr, group: tl.constexpr,
                       half: tl.constexpr, row_bytes: tl.constexpr, operand: tl.constexpr,
                       block_out: tl.constexpr):  # fmt: skip
    """out [rows, in_features]: rows of a matrix that has `stride` of them. scale: from the first of these rows on."""
    o = tl.program_id(0) * block_out + tl.arange(0, block_out)
    block = tl.program_id(1)
    j = tl.arange(0, half)
    groups: tl.constexpr = half // group
    row = o[:, None].to(tl.int64)
    inside = o < rows
    low, high = _nibbles(tl.load(weight + row * row_bytes + block * half + j[None, :], mask=inside[:, None], other=0), operand)
    low = _scaled(low, scale, 2 * groups * block, o, inside, stride, groups, group, operand, block_out)
    high = _scaled(high, scale, 2 * groups * block + groups, o, inside, stride, groups, group, operand, block_out)
    place = out + row * in_features + 2 * half * block + j[None, :]
    left = in_features - 2 * half * block - j[None, :]
    tl.store(place, low.to(out.dtype.element_ty), mask=inside[:, None] & (left > 0))
    tl.store(place + half, high.to(out.dtype.element_ty), mask=inside[:, None] & (left > half))
