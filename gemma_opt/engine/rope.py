"""Rotary position embedding: tables for every position of a slot, one for sliding layers and one for full ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_opt.engine.weights import TextWeights

Rotation = tuple[Tensor, Tensor]  # cosine and sine, float32 [positions, head_dim / 2]


@dataclass(frozen=True)
class RopeTables:
    """Rotations of all positions below `context`."""

    sliding: Rotation
    full: Rotation

    @classmethod
    def of(cls, weights: TextWeights, context: int) -> RopeTables:
        """Computed in float32, as transformers does."""
        return cls(rope_table(weights.sliding_frequencies, context), rope_table(weights.full_frequencies, context))

    def at(self, positions: slice | Tensor, *, sliding: bool) -> Rotation:
        """The rotations of some positions."""
        cos, sin = self.sliding if sliding else self.full
        return cos[positions], sin[positions]


def rope_table(frequencies: Tensor, positions: int) -> Rotation:
    """frequencies: float32 [head_dim / 2], in radians a position."""
    angles = torch.arange(positions, device=frequencies.device).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [tokens, heads, head_dim] by one rotation a token; the halves of a head are the two coordinates."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
