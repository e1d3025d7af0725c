# pyright: basic, reportCallIssue=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""The input of a product on the grid of an activation format, and what passes between the two products of low rank.

Steps are whole numbers, or e4m3 values, carried in the activations' dtype, which holds both exactly: `multiply` takes them
like any activations and multiplies what comes out by the row's scale. The same values as `quantize_input`, to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemma_opt.engine.kernels.triton_overlap import overlaps, wait_for_input
from gemma_opt.recipe import Activation

LIMITS: dict[Activation, int] = {
    "none": 0, "int8_dynamic": 127, "int8_static": 127, "fp8_dynamic": 448, "fp8_static": 448
}  # fmt: skip


@triton.jit
def _nearest_whole(x):
    """Ties to even, for |x| < 2²²: there float32 numbers that large have no fraction left."""
    return (x + 12582912.0) - 12582912.0  # 1.5 · 2²³


@triton.jit
def _nearest_e4m3(x):
    """Ties to even, for |x| ≤ 448. Below 2⁻⁶ steps are of one size."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return tl.where(tl.abs(x) < 0.015625, _nearest_whole(x * 512.0) * 0.001953125, bits.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["rows"])
def _settle_kernel(partial, rows, input_scale, steps, scales, splits: tl.constexpr, width: tl.constexpr, limit: tl.constexpr,
                   is_static: tl.constexpr, block: tl.constexpr, early: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    d = tl.arange(0, block)
    inside = d < width
    wait_for_input(early)
    x = tl.zeros((block,), tl.float32)
    for split in tl.static_range(splits):
        x += tl.load(partial + (split * rows + row) * width + d, mask=inside, other=0.0).to(tl.float32)
    x = x.to(steps.dtype.element_ty).to(tl.float32)
    if limit > 0:
        if is_static:  # noqa: SIM108 a choice when compiling
            scale = tl.load(input_scale)
        else:
            scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), 1e-12), limit * 1.0)
        if tl.sum((x != x).to(tl.int32), 0) > 0:  # no step can be NaN, and maxima lose it: the scale says it
            scale = scale * float("nan")
            x = tl.zeros_like(x)
        else:
            x = tl.minimum(tl.maximum(tl.div_rn(x, scale), -limit), limit)
        x = _nearest_whole(x) if limit == 127 else _nearest_e4m3(x)
        tl.store(scales + row, scale)
    tl.store(steps + row * width + d, x.to(steps.dtype.element_ty), mask=inside)


def settle(partial: Tensor, activation: Activation, input_scale: Tensor | None, steps: Tensor, scales: Tensor) -> None:
    """Add partial results up, round them to the activations' dtype and put them on a grid: steps · scales.

    partial: [splits, rows, width], float; steps: [rows, width]; scales: float32 [rows], left alone for "none".
    """
    splits, rows, width = partial.shape
    early = overlaps(steps)
    _settle_kernel[(rows,)](
        partial, rows, scales if input_scale is None else input_scale, steps, scales, splits=splits, width=width,
        limit=LIMITS[activation], is_static=input_scale is not None, block=triton.next_power_of_2(width), num_warps=8,
        early=early, launch_pdl=early,
    )  # fmt: skip
