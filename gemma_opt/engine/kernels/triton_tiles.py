# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""How a program of a product begins and ends, whatever its weights are stored as."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_opt.engine.kernels.triton_overlap import prefetch_rows, wait_for_input


@triton.jit
def outputs_of_tile(out_features, gated: tl.constexpr, block_out: tl.constexpr):
    """Rows of the weight [block_out] in this program's tile, and whether there are such.

    gated: 8 rows of gate, the 8 of up that belong to them, and so on: a thread of the matrix units holds both of a pair.
    """
    index = tl.arange(0, block_out)
    if gated:
        output = tl.program_id(1) * (block_out // 2) + index // 16 * 8 + index % 8
        return output + index // 8 % 2 * out_features, output < out_features
    output = tl.program_id(1) * block_out + index
    return output, output < out_features


@triton.jit
def begin_tile(weight, split, out_features, gated: tl.constexpr, splits: tl.constexpr, block_out: tl.constexpr,
           early: tl.constexpr, row_bytes: tl.constexpr, ahead: tl.constexpr, threads: tl.constexpr):  # fmt: skip
    """Have the first bytes of this program's rows fetched, then wait for the activations."""
    if ahead:
        first = weight.to(tl.pointer_type(tl.uint8))
        outputs: tl.constexpr = block_out // 2 if gated else block_out
        row = tl.program_id(1) * outputs
        begin = split * (row_bytes // splits)
        prefetch_rows(first, row, out_features, row_bytes, begin, ahead, outputs, threads)
        if gated:
            prefetch_rows(first + out_features * row_bytes, row, out_features, row_bytes, begin, ahead, outputs, threads)
    wait_for_input(early)


@triton.jit
def gelu_tanh(x):
    """GELU in its tanh form, of float32."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2·√(2/π)


@triton.jit
def finish_tile(acc, out, x_scale, r, split, rows, out_features, gated: tl.constexpr, has_x_scale: tl.constexpr,
                block_out: tl.constexpr, block_rows: tl.constexpr):  # fmt: skip
    """Store a tile [block_out, rows]; gated: gelu(gate) · up, rounded where separate modules would round."""
    if has_x_scale:
        acc = acc * tl.load(x_scale + r, mask=r < rows, other=0.0)[None, :]
    outputs: tl.constexpr = block_out // 2 if gated else block_out
    if gated:
        pairs = tl.permute(tl.reshape(acc, (block_out // 16, 2, 8, block_rows)), (0, 2, 3, 1))
        gate, up = tl.split(tl.reshape(pairs, (outputs, block_rows, 2)))
        gate = gelu_tanh(gate.to(out.dtype.element_ty).to(tl.float32))
        acc = gate.to(out.dtype.element_ty).to(tl.float32) * up.to(out.dtype.element_ty).to(tl.float32)
    o = tl.program_id(1) * outputs + tl.arange(0, outputs)
    place = (split * rows + r)[None, :] * out_features + o[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(r[None, :] < rows) & (o[:, None] < out_features))
