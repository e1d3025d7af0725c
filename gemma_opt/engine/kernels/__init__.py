"""Hand-written decode steps, each for one kind of device. Where none fits, the engine runs on torch operations."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.rope import RopeTables
from gemma_opt.engine.weights import TextWeights


class DecodeStep(Protocol):
    """One token for each of some rows, over given weights and cache: what `TextModel.decode` promises."""

    def __call__(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """float32 logits [rows, vocabulary]."""
        ...


def find_decode_step(weights: TextWeights, cache: KvCache, rope: RopeTables) -> DecodeStep | None:
    """The fastest decode step this machine has for these weights; None: torch operations."""
    if weights.device.type == "cpu":
        from gemma_opt.engine.kernels.cpu import find_cpu_step

        return find_cpu_step(weights, cache, rope)
    return None
