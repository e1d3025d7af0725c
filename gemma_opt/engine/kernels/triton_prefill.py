"""Prefill of one chunk on a GPU. Of what torch would launch for a layer, some seventy kernels, ten are left at least."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.kernels.triton_chunk import attend_to_slot
from gemma_opt.engine.kernels.triton_layer import Heads, add_norm, make_heads, store_heads
from gemma_opt.engine.kernels.triton_matrices import TritonLinear
from gemma_opt.engine.kernels.triton_tuning import Tuning
from gemma_opt.engine.linear import rms_norm
from gemma_opt.engine.rope import RopeTables
from gemma_opt.engine.weights import TextWeights


class TritonPrefill:
    """A `PrefillStep`: products by `TritonLinear`, attention over what the slot holds, norms by the decode step's kernels."""

    def __init__(self, weights: TextWeights, cache: KvCache, rope: RopeTables, tuning: Tuning) -> None:
        self._weights, self._cache, self._rope, self._linear = weights, cache, rope, TritonLinear(tuning)

    def __call__(self, embeddings: Tensor, slot: Tensor, last: Tensor, positions: Tensor, pictures: Tensor) -> Tensor:
        """See `PrefillStep`."""
        weights, shape = self._weights, self._weights.shape
        rows, layers = embeddings.shape[0], weights.layers
        slots = slot.expand(rows).contiguous()
        residual = embeddings.clone()
        normed = rms_norm(residual, layers[0].input_norm, shape.eps)
        made = torch.empty(rows, shape.all_heads, shape.head_dim, dtype=weights.dtype, device=weights.device)
        next_norms = [layer.input_norm for layer in layers[1:]] + [weights.final_norm]
        for layer, cache, next_norm in zip(layers, self._cache.layers, next_norms, strict=True):
            cos, sin = self._rope.sliding if layer.sliding else self._rope.full
            # partial results have no names: the next product takes their memory
            make_heads(
                Heads(
                    self._linear.partial(layer.qkv, normed), slots, positions, layer.query_norm, layer.key_norm, cos, sin,
                    shape.eps,
                ),
                made, kv_heads=shape.kv_heads,
            )  # fmt: skip
            attended = attend_to_slot(
                made, slot, positions, pictures, cache.keys, cache.values,
                scale=shape.attention_scale, window=self._cache.window if layer.sliding else None,
            )  # fmt: skip
            store_heads(made, slots, positions, cache.keys, cache.values, last)
            add_norm(
                self._linear.partial(layer.o, attended), layer.post_attention_norm, residual, layer.pre_mlp_norm, normed,
                eps=shape.eps,
            )  # fmt: skip
            add_norm(
                self._linear.partial(layer.down, self._linear.gated(layer.gate_up, normed)), layer.post_mlp_norm, residual,
                next_norm, normed, eps=shape.eps,
            )  # fmt: skip
        return self._linear(weights.head, normed.index_select(0, last)).float()[0]
