"""Int4 grids fitted to the weights: round, refit scale and zero point by least squares, round again.

That is half-quadratic quantization (Badri and Shaji 2023) with p = 2. Its p < 1, which gives up the largest weights for the
many small ones, was worse than plain rounding on Gemma 3 270M, and p = 1.4 too; what helped is to weigh errors by the inputs
they meet. Zero points stay whole (zeros must stay zeros, checkpoints hold uint8). Several ranges are tried, plain rounding
among them, and the best of each group stays: no group is worse than plain rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.quantization.grid import LEVELS, Grid, range_grid, stored_scale

RANGES = (1.0, 0.92, 0.85, 0.78, 0.7)  # shares of a group's range to start from: clipping its extremes serves the others
STEPS = 6


def fitted_grid(weight: Tensor, *, symmetric: bool, importance: Tensor | None = None) -> Grid:
    """The grid of least squared error for every group. weight: float32 [out, groups, group].

    importance: [groups, group], how much the square of an error counts; None: all alike.
    """
    importance = torch.ones_like(weight[0]) if importance is None else importance
    best = whole = range_grid(weight, symmetric=symmetric)
    least = _cost(weight, best, importance)
    for share in RANGES:
        candidate = _shrunk(whole, weight, share, symmetric)
        for _ in range(STEPS):
            candidate = _refitted(weight, candidate, importance, symmetric)
            cost = _cost(weight, candidate, importance)
            better = cost < least
            best = Grid(torch.where(better, candidate.scale, best.scale), torch.where(better, candidate.zero, best.zero))
            least = torch.where(better, cost, least)
    return best


def _shrunk(grid: Grid, weight: Tensor, share: float, symmetric: bool) -> Grid:
    scale = stored_scale(grid.scale * share)
    if symmetric:
        return Grid(scale, grid.zero)
    middle = (weight.amin(dim=-1).clamp(max=0) + weight.amax(dim=-1).clamp(min=0)) / 2
    return Grid(scale, ((LEVELS - 1) / 2 - middle / scale).round_().clamp_(0, LEVELS - 1))


def _refitted(weight: Tensor, grid: Grid, importance: Tensor, symmetric: bool) -> Grid:
    """The zero point of least error for the steps that a grid rounds to, then the scale for that one."""
    nibbles, zero = grid.nibbles(weight), grid.zero
    if not symmetric:
        total = importance.sum(dim=-1).clamp(min=1e-30)
        zero = ((nibbles - weight / grid.scale[..., None]) * importance).sum(dim=-1) / total
        zero = zero.round_().clamp_(0, LEVELS - 1)
    steps = nibbles - zero[..., None]
    power = (steps.square() * importance).sum(dim=-1)
    fitted = (steps * weight * importance).sum(dim=-1) / power.clamp(min=1e-30)
    return Grid(torch.where(fitted > 0, stored_scale(fitted), grid.scale), zero)


def _cost(weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """[out, groups]."""
    return ((weight - grid.values(grid.nibbles(weight))).square() * importance).sum(dim=-1)
