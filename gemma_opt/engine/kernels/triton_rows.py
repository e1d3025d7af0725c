# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""What stands around the vendor's products: weights widened before, and everything that follows a product in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_opt.engine.kernels.triton_tiles import gelu_tanh

WIDENED = 4096  # weights a program
BLOCK_ROWS, BLOCK_OUT = 32, 128  # results a program: a scale and a bias are read once for 32 rows


@triton.jit
def _widen_kernel(weight, out, size, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    # by way of float32: from fp8 the direct one does not compile for GPUs before Hopper
    w = tl.load(weight + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, w.to(out.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["rows"])
def _finish_kernel(product, scale, x_scale, bias, out, rows, width, product_stride, out_stride, has_scale: tl.constexpr,
                   has_x_scale: tl.constexpr, has_bias: tl.constexpr, gelu: tl.constexpr, block_rows: tl.constexpr,
                   block_out: tl.constexpr):  # fmt: skip
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    o = tl.program_id(1) * block_out + tl.arange(0, block_out)
    mask = (r[:, None] < rows) & (o[None, :] < width)
    y = tl.load(product + r[:, None] * product_stride + o[None, :], mask=mask, other=0).to(tl.float32)
    if has_scale:
        y = y * tl.load(scale + o, mask=o < width, other=0.0)[None, :]
    if has_x_scale:
        y = y * tl.load(x_scale + r, mask=r < rows, other=0.0)[:, None]
    if has_bias:
        y += tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    if gelu:
        y = gelu_tanh(y)
    tl.store(out + r[:, None] * out_stride + o[None, :], y.to(out.dtype.element_ty), mask=mask)


def widen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 or fp8 weights, contiguous, in `dtype`, which holds their values exactly."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _widen_kernel[(triton.cdiv(weight.numel(), WIDENED),)](weight, out, weight.numel(), block=WIDENED, num_warps=4)
    return out


def finish(
    product: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gelu: bool = False,
) -> None:
    """out = product · scale · x_scale + bias, or its GELU, computed in float32 and rounded once.

    product: float or int32 [rows, width]; out may be the same. scale: float32 [width]; x_scale: float32 [rows]; bias: [width].
    """
    rows, width = out.shape
    _finish_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(width, BLOCK_OUT))](
        product, product if scale is None else scale, product if x_scale is None else x_scale,
        product if bias is None else bias, out, rows, width, product.stride(0), out.stride(0), has_scale=scale is not None,
        has_x_scale=x_scale is not None, has_bias=bias is not None, gelu=gelu, block_rows=BLOCK_ROWS, block_out=BLOCK_OUT,
        num_warps=4,
    )  # fmt: skip
