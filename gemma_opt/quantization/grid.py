"""Grids of 4-bit steps: pure functions from float weights to nibbles, scales and zero points, and their packing.

A weight is (nibble − zero) · scale, nibble and zero from 0 to 15, scale and zero shared by a group of neighbours in a row.
Zero itself is always on the grid, because zero points are whole numbers: pruned weights stay exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 16
SYMMETRIC_ZERO = 8
_ROUNDING = 1.02 * 2**-7  # relative: of a weight to bfloat16 (half of it) and of its scale (the other half)
_FLOOR = 1e-8  # scale of a group of zeros; any positive number that bfloat16 holds would do


@dataclass(frozen=True)
class Grid:
    """The steps of every group. scale: float32 [out, groups] with values that bfloat16 holds; zero: the same shape, 0..15."""

    scale: Tensor
    zero: Tensor

    def nibbles(self, weight: Tensor) -> Tensor:
        """The nearest step of every weight. weight: float [out, groups, group]. Returns float 0..15 of that shape."""
        return (weight / self.scale[..., None] + self.zero[..., None]).round_().clamp_(0, LEVELS - 1)

    def values(self, nibbles: Tensor) -> Tensor:
        """What nibbles stand for, float32."""
        return (nibbles - self.zero[..., None]) * self.scale[..., None]


def grouped(weight: Tensor, group: int) -> Tensor:
    """[out, in] → float32 [out, groups, group]."""
    return weight.float().unflatten(1, (-1, group))


def range_grid(weight: Tensor, *, symmetric: bool) -> Grid:
    """The finest grid that reaches the extremes of every group. weight: [out, groups, group].

    Symmetric grids have 7 steps above zero and 8 below: the scale is the extreme over 7.5, which costs the largest weight at
    most half a step, and gives all others a finer one than the extreme over 7.
    """
    if symmetric:
        scale = stored_scale(weight.abs().amax(dim=-1) / (LEVELS / 2 - 0.5))
        return Grid(scale, torch.full_like(scale, SYMMETRIC_ZERO))
    low, high = weight.amin(dim=-1).clamp(max=0), weight.amax(dim=-1).clamp(min=0)
    scale = stored_scale((high - low) / (LEVELS - 1))
    return Grid(scale, (-low / scale).round_().clamp_(0, LEVELS - 1))


def exact_grid(weight: Tensor) -> tuple[Grid, Tensor]:
    """The symmetric grid that weights already lie on, and where they do: bool [out, groups].

    Quantization-aware checkpoints hold whole multiples of a scale, −8 to 7 or −7 to 8 of them, rounded to bfloat16. Tried are
    the scales at which a group's extreme is 8, 7, …, 1 steps; the coarsest that gives every weight back within the rounding
    of weight and scale counts. weight: [out, groups, group].
    """
    peak = weight.abs().amax(dim=-1)
    scale, zero = torch.ones_like(peak), torch.full_like(peak, SYMMETRIC_ZERO)
    fits = torch.zeros_like(peak, dtype=torch.bool)
    for steps in range(SYMMETRIC_ZERO, 0, -1):
        candidate = _least_squares_scale(weight, stored_scale(peak / steps))
        multiples = (weight / candidate[..., None]).round_()
        close = ((multiples * candidate[..., None] - weight).abs() <= weight.abs() * _ROUNDING).all(dim=-1)
        one_sided = (multiples.amax(dim=-1) < SYMMETRIC_ZERO) | (multiples.amin(dim=-1) > -SYMMETRIC_ZERO)
        found = close & one_sided & (multiples.abs().amax(dim=-1) <= SYMMETRIC_ZERO)
        scale = torch.where(found, candidate, scale)
        zero = torch.where(found, torch.where(multiples.amax(dim=-1) < SYMMETRIC_ZERO, 8.0, 7.0), zero)
        fits |= found
    return Grid(_to_the_bit(weight, scale), zero), fits


def _to_the_bit(weight: Tensor, scale: Tensor) -> Tensor:
    """Of a scale and its neighbours in bfloat16, the one that gives most weights of the group back exactly, in bfloat16."""
    multiples, wanted = (weight / scale[..., None]).round_(), weight.bfloat16()
    bits = scale.bfloat16().view(torch.int16)
    candidates = [(bits + offset).view(torch.bfloat16).float() for offset in (0, -1, 1)]
    right = torch.stack([((multiples * one[..., None]).bfloat16() == wanted).sum(dim=-1) for one in candidates])
    return torch.stack(candidates).gather(0, right.argmax(dim=0, keepdim=True))[0]


def prefer_exact(weight: Tensor, found: Grid, *, symmetric: bool) -> Grid:
    """`found`, but the grid that weights lie on wherever they do and the format holds its zero point."""
    exact, fits = exact_grid(weight)
    if symmetric:
        fits = fits & (exact.zero == SYMMETRIC_ZERO)
    return Grid(torch.where(fits, exact.scale, found.scale), torch.where(fits, exact.zero, found.zero))


def _least_squares_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """The scale that fits a group best at the multiples which another one rounds it to."""
    multiples = (weight / scale[..., None]).round_()
    power = multiples.square().sum(dim=-1)
    return torch.where(power > 0, stored_scale((multiples * weight).sum(dim=-1) / power.clamp(min=1)), scale)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as a checkpoint holds them: positive, rounded to bfloat16. float32 in and out."""
    return scale.clamp(min=_FLOOR).bfloat16().float()


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """[out, in] of 0..15 → uint8 [out, in/2], the even column in the low nibble."""
    pairs = nibbles.byte().unflatten(1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [out, in/2] → uint8 [out, in]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
