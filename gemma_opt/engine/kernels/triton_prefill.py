"""Prefill of one chunk on a GPU. Of what torch would launch for a layer, some seventy kernels, about fifteen are left."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.kernels.triton_layer import Heads, add_norm, place_qkv
from gemma_opt.engine.kernels.triton_matrices import TritonLinear
from gemma_opt.engine.linear import grouped_attention, rms_norm
from gemma_opt.engine.rope import RopeTables
from gemma_opt.engine.weights import TextWeights


class TritonPrefill:
    """A `PrefillStep`: products by `linear`, attention by torch, and what stands between them by the decode step's kernels."""

    def __init__(self, weights: TextWeights, cache: KvCache, rope: RopeTables, linear: TritonLinear) -> None:
        self._weights, self._cache, self._rope, self._linear = weights, cache, rope, linear

    def __call__(
        self, embeddings: Tensor, positions: Tensor, slot: Tensor, last: Tensor, biases: Mapping[bool, Tensor]
    ) -> Tensor:
        """Float32 logits [vocabulary] after row `last`."""
        weights, shape = self._weights, self._weights.shape
        rows, layers = embeddings.shape[0], weights.layers
        slots = slot.expand(rows).contiguous()
        residual = embeddings.clone()
        normed = rms_norm(residual, layers[0].input_norm, shape.eps)
        query = torch.empty(rows, shape.heads, shape.head_dim, dtype=weights.dtype, device=weights.device)
        next_norms = [layer.input_norm for layer in layers[1:]] + [weights.final_norm]
        for layer, cache, next_norm in zip(layers, self._cache.layers, next_norms, strict=True):
            cos, sin = self._rope.sliding if layer.sliding else self._rope.full
            partial = self._linear.partial(layer.qkv, normed)
            given = Heads(partial, slots, positions, layer.query_norm, layer.key_norm, cos, sin, shape.eps)
            place_qkv(given, query, cache.keys, cache.values)
            bias = biases[layer.sliding]
            keys, values = (part[:, :, : bias.shape[1]].index_select(0, slot)[0] for part in (cache.keys, cache.values))
            attended = grouped_attention(query, keys, values, bias, shape.attention_scale)
            mixed = self._linear.partial(layer.o, attended.flatten(1))
            add_norm(mixed, layer.post_attention_norm, residual, layer.pre_mlp_norm, normed, eps=shape.eps)
            mixed = self._linear.partial(layer.down, self._linear.gated(layer.gate_up, normed))
            add_norm(mixed, layer.post_mlp_norm, residual, next_norm, normed, eps=shape.eps)
        return self._linear(weights.head, normed.index_select(0, last)).float()[0]
