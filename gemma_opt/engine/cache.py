"""The KV cache: static slots, a ring of the window for sliding layers, the whole context for full layers.

Position p of a slot lies at index p modulo the layer's length. Which position an index holds follows from the newest
position alone, so nothing is cleared between requests: whoever attends computes what is valid and never reads the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_opt.engine.weights import TextWeights


@dataclass(frozen=True)
class LayerCache:
    """Keys (after norm and RoPE) and values of one layer: [slots, kv_heads, length, head_dim] each."""

    keys: Tensor
    values: Tensor
    sliding: bool

    @property
    def length(self) -> int:
        """Positions a slot holds."""
        return self.keys.shape[2]

    def write_(self, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store the positions from `start` on, as many of the last as fit. keys, values: [kv_heads, tokens, head_dim]."""
        count = min(keys.shape[1], self.length)
        end = start + keys.shape[1]
        places = torch.arange(end - count, end, device=keys.device) % self.length
        self.keys[slot].index_copy_(1, places, keys[:, -count:])
        self.values[slot].index_copy_(1, places, values[:, -count:])

    def append_(self, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store one position per row. slots, positions: int64 [rows]; keys, values: [rows, kv_heads, head_dim]."""
        places = positions % self.length
        self.keys[slots, :, places] = keys
        self.values[slots, :, places] = values

    def read(self, slot: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions begin ≤ p < end, in order: [kv_heads, tokens, head_dim]. They must be stored."""
        first, count = begin % self.length, end - begin
        if first + count <= self.length:  # no wrap: a view
            return self.keys[slot, :, first : first + count], self.values[slot, :, first : first + count]
        places = torch.arange(begin, end, device=self.keys.device) % self.length
        return self.keys[slot].index_select(1, places), self.values[slot].index_select(1, places)


class KvCache:
    """The cache of all slots, allocated once.

    slots: requests at once; context: tokens a slot holds; slack: how many tokens past the newest accepted one may be
    written and taken back (speculation), by which rings are longer than the window. Everything is in `weights.dtype`.
    """

    def __init__(self, weights: TextWeights, *, slots: int, context: int, slack: int = 0) -> None:
        self.slots, self.context, self.slack = slots, context, slack
        self.window = weights.shape.window
        ring = min(self.window + slack, context)
        self.layers = tuple(
            LayerCache(
                *(_zeros(weights, slots, ring if layer.sliding else context) for _ in ("keys", "values")),
                sliding=layer.sliding,
            )
            for layer in weights.layers
        )

    def check_end(self, end: int) -> None:
        """ValueError if a slot cannot hold the positions before `end`."""
        if end > self.context:
            raise ValueError(f"position {end - 1} is beyond the context of {self.context}")

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


def _zeros(weights: TextWeights, slots: int, length: int) -> Tensor:
    """Zeros, not uninitialised memory: a masked NaN would still poison what it is multiplied with."""
    shape = weights.shape
    return torch.zeros(slots, shape.kv_heads, length, shape.head_dim, dtype=weights.dtype, device=weights.device)
