# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""How a program of a product begins and ends, whatever its weights are stored as."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_opt.engine.kernels.triton_overlap import prefetch_rows, wait_for_input


@triton.jit
def begin_tile(weight, split, out_features, gated: tl.constexpr, splits: tl.constexpr, block_out: tl.constexpr,
           early: tl.constexpr, row_bytes: tl.constexpr, ahead: tl.constexpr, threads: tl.constexpr):  # fmt: skip
    """Have the first bytes of this program's rows fetched, then wait for the activations."""
    if ahead:
        first = weight.to(tl.pointer_type(tl.uint8))
        row = tl.program_id(1) * block_out
        begin = split * (row_bytes // splits)
        prefetch_rows(first, row, out_features, row_bytes, begin, ahead, block_out, threads)
        if gated:
            prefetch_rows(first + out_features * row_bytes, row, out_features, row_bytes, begin, ahead, block_out, threads)
    wait_for_input(early)


@triton.jit
def finish_tile(acc, above, out, x_scale, r, o, split, rows, out_features, gated: tl.constexpr, has_x_scale: tl.constexpr):
    """Store a tile [outputs, rows]; gated: gelu(acc) · above, rounded where separate modules would round."""
    if has_x_scale:
        x_scales = tl.load(x_scale + r, mask=r < rows, other=0.0)[None, :]
        acc = acc * x_scales
        if gated:
            above = above * x_scales
    if gated:
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
        acc = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))  # gelu's tanh form; 2·√(2/π)
        acc = acc.to(out.dtype.element_ty).to(tl.float32) * above.to(out.dtype.element_ty).to(tl.float32)
    place = (split * rows + r)[None, :] * out_features + o[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(r[None, :] < rows) & (o[:, None] < out_features))
