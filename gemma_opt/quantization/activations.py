"""Inputs of a linear on an int8 or float8 grid: what a quantized product multiplies.

Symmetric, with one scale a token (dynamic) or one for all (static). Steps are whole numbers, or e4m3 values, carried in the
activations' dtype, which holds both exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.recipe import Activation

INT8_MAX = 127.0
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest e4m3; torch's cast makes NaN of what rounds beyond it
FLOOR = 1e-12  # scale of a token of zeros


def limit_of(activation: Activation) -> float:
    """The largest step of a grid, in whole numbers or e4m3 values."""
    return INT8_MAX if activation.startswith("int8") else FP8_MAX


def quantize_input(x: Tensor, activation: Activation, static_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(steps, scale) with x ≈ steps · scale. x: [..., in]; steps: like x; scale: float32 [..., 1] or [], None where x stays."""
    if activation == "none":
        return x, None
    limit = limit_of(activation)
    scale = _scale_of(x, limit) if static_scale is None else static_scale
    steps = (x.float() / scale).clamp(-limit, limit)
    return (steps.round() if limit == INT8_MAX else steps.to(FP8)).to(x.dtype), scale


def _scale_of(x: Tensor, limit: float) -> Tensor:
    """float32 [..., 1]. Divided by a tensor: instead of by a plain number, torch multiplies by its inverse on a GPU."""
    largest = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=FLOOR)
    return largest / torch.full_like(largest, limit)
