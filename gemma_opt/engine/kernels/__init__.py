"""Hand-written decode steps, each for one kind of device. Where none fits, the engine runs on torch operations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.linear import Visible, attend_to_chunk, linear
from gemma_opt.engine.packed import Arrange, PackedLinear, as_they_are
from gemma_opt.engine.rope import RopeTables
from gemma_opt.engine.weights import TextWeights


class DecodeStep(Protocol):
    """One token for each of some rows, over given weights and cache: what `TextModel.decode` promises."""

    def __call__(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """float32 logits [rows, vocabulary]."""
        ...


class PrefillStep(Protocol):
    """What `TextModel.prefill` does, without anything that the host decides: for a recording."""

    def __call__(self, embeddings: Tensor, slot: Tensor, last: Tensor, positions: Tensor, pictures: Tensor) -> Tensor:
        """Float32 logits [vocabulary] after row `last`.

        embeddings: [rows, hidden]. slot, last: int64 [1]. positions, pictures: int64 [rows], the first consecutive, the second
        the number of each row's picture, 0 for none. Rows behind `last` may hold anything finite, of no picture and at any
        position below the context: nobody sees them, and they are not stored.
        """
        ...


class Linear(Protocol):
    """The product of activations with a packed linear: what `engine.linear.linear` promises."""

    def __call__(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """x: [rows, in], float. Returns [rows, out] in x's dtype."""
        ...


class ChunkAttention(Protocol):
    """Attention of a chunk of one slot's prompt: what `engine.linear.attend_to_chunk` promises."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, visible: Visible, scale: float) -> Tensor:
        """query: [tokens, heads, head_dim], like the result; keys, values: [kv_heads, keys, head_dim]."""
        ...


@dataclass(frozen=True)
class Kernels:
    """What a device has for one model: a decode step, and for prefill a step as well, or its products and attention."""

    decode_step: DecodeStep
    linear: Linear = linear
    attention: ChunkAttention = attend_to_chunk
    prefill_step: PrefillStep | None = None


def arrangement(device: torch.device) -> Arrange:
    """The order in which this device's kernels read packed linears, for `take_weights`."""
    from gemma_opt.engine.kernels.gpu import why_not

    if why_not(device):
        return as_they_are
    from gemma_opt.engine.kernels.triton_matrices import arrange

    return arrange


def find_kernels(weights: TextWeights, cache: KvCache, rope: RopeTables, compile_cache: Path | None = None) -> Kernels | None:
    """The fastest kernels this machine has for these weights; None: torch operations.

    compile_cache: a checkpoint's folder of that name, with what was measured and compiled for this device, if anything.
    """
    if weights.device.type == "cpu":
        from gemma_opt.engine.kernels.cpu import CpuChunkAttention, CpuLinear, find_cpu_step

        step = find_cpu_step(weights, cache, rope)
        return Kernels(step, CpuLinear(step.library), CpuChunkAttention(step.library)) if step else None
    if weights.device.type == "cuda":
        from gemma_opt.engine.kernels.gpu import find_gpu_kernels

        found = find_gpu_kernels(weights, cache, rope, compile_cache)
        if found:
            decode_step, prefill_step = found
            return Kernels(decode_step, prefill_step=prefill_step)
    return None
