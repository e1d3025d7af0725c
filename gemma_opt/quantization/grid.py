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
