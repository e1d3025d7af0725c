"""Int4 grids fitted to the weights: half-quadratic quantization, without data.

Minimizes Σ |w − (nibble − zero) · scale|ᵖ of every group. With p < 2 few large errors may be large: the half-quadratic step
takes them out of the least-squares fit of scale and zero. Source: Badri and Shaji 2023, "Half-Quadratic Quantization".
Differs in that zero points stay whole (zeros must stay zeros, checkpoints hold uint8), that scales are solved for too, and in
starting from several ranges and keeping the best of each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.quantization.grid import LEVELS, Grid, range_grid, stored_scale

RANGES = (1.0, 0.92, 0.85, 0.78, 0.7)  # shares of a group's range to start from: clipping its extremes serves the others
STEPS = 6
# p, chosen on the bundled model's answers. The source's 0.7 gives up the largest weights: worse there than plain rounding.
POWER, SYMMETRIC_POWER = 1.4, 2.0
BETA = 10.0  # how close the taken-out errors are held to the real ones, growing by KAPPA a step (the source's settings)
KAPPA = 1.01


def fitted_grid(weight: Tensor, *, symmetric: bool, importance: Tensor | None = None) -> Grid:
    """The grid of least error for every group. weight: float32 [out, groups, group].

    importance: [groups, group], how much the square of an error counts (p is 2 then); None: all alike.
    """
    power = 2.0 if importance is not None else SYMMETRIC_POWER if symmetric else POWER
    best = whole = range_grid(weight, symmetric=symmetric)
    least = _cost(weight, best, importance, power)
    for share in RANGES:
        candidate = _shrunk(whole, weight, share, symmetric)
        for step in range(STEPS):
            candidate = _improved(weight, candidate, importance, power, BETA * KAPPA**step, symmetric)
            cost = _cost(weight, candidate, importance, power)
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


def _improved(weight: Tensor, grid: Grid, importance: Tensor | None, power: float, beta: float, symmetric: bool) -> Grid:
    """One half-quadratic step: round, take the large errors out, refit zero point and scale to the rest."""
    nibbles = grid.nibbles(weight)
    wanted = weight
    if power < 2:
        error = weight / grid.scale[..., None] - (nibbles - grid.zero[..., None])  # in steps: beta means the same everywhere
        apart = error.abs()
        large = (apart - apart.clamp(min=1e-6).pow(power - 1) / beta).clamp_(min=0)
        wanted = weight - error.sign() * large * grid.scale[..., None]
    share = torch.ones_like(weight[:1, :, :]) if importance is None else importance[None]
    total = share.sum(dim=-1).clamp(min=1e-30)
    zero = grid.zero
    if not symmetric:
        zero = ((nibbles - wanted / grid.scale[..., None]) * share).sum(dim=-1) / total
        zero = zero.round_().clamp_(0, LEVELS - 1)
    steps = nibbles - zero[..., None]
    power_sum = (steps.square() * share).sum(dim=-1)
    fitted = (steps * wanted * share).sum(dim=-1) / power_sum.clamp(min=1e-30)
    return Grid(torch.where(fitted > 0, stored_scale(fitted), grid.scale), zero)


def _cost(weight: Tensor, grid: Grid, importance: Tensor | None, power: float) -> Tensor:
    """[out, groups]."""
    error = (weight - grid.values(grid.nibbles(weight))).abs()
    return error.pow(power).sum(dim=-1) if importance is None else (error.square() * importance).sum(dim=-1)
