"""Gemma 3's text model over packed tensors: prefill in chunks, decode with an explicit position per row.

Written for one purpose, serving: slots instead of batches, logits of last positions only, every row at its own position.
Everything here is plain torch and runs on any device; `kernels` may replace the products and the whole of `decode`.
transformers' `generate` is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.engine.cache import KvCache, LayerCache
from gemma_opt.engine.kernels import ChunkAttention, DecodeStep, Linear, PrefillStep, find_kernels
from gemma_opt.engine.linear import Visible, attend_to_chunk, gated_gelu, linear, rms_norm, rows_of
from gemma_opt.engine.rope import RopeTables, Rotation, rotate
from gemma_opt.engine.scheduler import Span, spans_inside
from gemma_opt.engine.weights import LayerWeights, TextShape, TextWeights

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class TextModel:
    """A text model and its cache.

    use_kernels: False keeps to the torch operations here, with which the kernels are compared. compile_cache: see
    `find_kernels`.
    """

    def __init__(
        self, weights: TextWeights, cache: KvCache, *, use_kernels: bool = True, compile_cache: Path | None = None
    ) -> None:
        self.weights, self.cache = weights, cache
        self.rope = RopeTables.of(weights, cache.context)
        found = find_kernels(weights, cache, self.rope, compile_cache) if use_kernels else None
        self._linear: Linear = found.linear if found else linear
        self._attention: ChunkAttention = found.attention if found else attend_to_chunk
        self._decode_step: DecodeStep = found.decode_step if found else self._decode_with_torch
        self.prefill_step: PrefillStep | None = found.prefill_step if found else None  # to record; does what `prefill` does

    def embed(self, token_ids: Tensor) -> Tensor:
        """Scaled embeddings [tokens, hidden] of token ids [tokens]."""
        return rows_of(self.weights.table, token_ids, self.weights.dtype) * self.weights.shape.embedding_scale

    def prefill(self, slot: int, embeddings: Tensor, start: int, image_spans: Sequence[Span] = ()) -> Tensor:
        """Read a chunk of one slot's prompt: positions from `start` on, all earlier ones read before.

        embeddings: [tokens, hidden]. image_spans: positions of pictures; inside one, tokens see each other both ways, so
        a chunk holds all of a span or nothing (ValueError otherwise); spans outside the chunk do not matter.
        Returns float32 logits [vocabulary] after the last token. Results depend on the chunks by rounding only.
        """
        end = start + embeddings.shape[0]
        self.cache.check_end(end)
        pictures = spans_inside(image_spans, start, end)
        visible = {
            sliding: self._visible(start, end, self._history_begin(start, sliding=sliding), pictures, window)
            for sliding, window in ((True, self.cache.window), (False, None))
        }
        rotations = {sliding: self.rope.at(slice(start, end), sliding=sliding) for sliding in (True, False)}
        x = embeddings
        for layer, cache in zip(self.weights.layers, self.cache.layers, strict=True):
            attend = self._chunk_attention(cache, slot, start, visible[layer.sliding])
            x = _block(x, layer, self.weights.shape, rotations[layer.sliding], self._linear, attend)
        return self._logits(x[-1:])[0]

    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """One step: row i puts `tokens[i]` at `positions[i]` of slot `slots[i]`. All int64 [rows].

        Returns float32 logits [rows, vocabulary]. Rows of one slot must have consecutive positions, `cache.slack` + 1 at
        most; a row's result does not depend on the rows of other slots. Tokens that turn out wrong need no clean-up: later
        ones overwrite them.
        """
        return self._decode_step(tokens, slots, positions)

    def _decode_with_torch(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """`decode` in torch operations of static shapes, without synchronisation. Reads the padded cache: slow, and right."""
        rotations = {sliding: self.rope.at(positions, sliding=sliding) for sliding in (True, False)}
        x = self.embed(tokens)
        for layer, cache in zip(self.weights.layers, self.cache.layers, strict=True):
            attend = self._row_attention(cache, slots, positions)
            x = _block(x, layer, self.weights.shape, rotations[layer.sliding], self._linear, attend)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        return self._linear(self.weights.head, rms_norm(x, self.weights.final_norm, self.weights.shape.eps)).float()

    def _history_begin(self, start: int, *, sliding: bool) -> int:
        """The first position that a chunk's tokens can see."""
        return max(0, start - self.cache.window + 1) if sliding else 0

    def _visible(self, start: int, end: int, history: int, spans: Sequence[Span], window: int | None) -> Visible:
        """Which positions each token of a chunk sees, counted from `history` on.

        Those up to its own, and all of its own picture; in sliding layers none further back than the window.
        """
        position = torch.arange(start, end, device=self.weights.device)
        last = position + 1
        for begin, stop in spans:
            last[begin - start : stop - start] = stop
        first = torch.zeros_like(position) if window is None else (position - window + 1).clamp(min=0)
        shape, dtype = self.weights.shape, self.weights.dtype
        return Visible((first - history).clamp(min=0), last - history, shape.group, dtype)

    def _chunk_attention(self, cache: LayerCache, slot: int, start: int, visible: Visible) -> Attend:
        """Attention of a chunk to what the slot holds and to itself; then the slot holds the chunk too."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = key.transpose(0, 1), value.transpose(0, 1)
            begin = self._history_begin(start, sliding=cache.sliding)
            old_keys, old_values = cache.read(slot, begin, start)
            keys, values = torch.cat((old_keys, key), dim=1), torch.cat((old_values, value), dim=1)
            out = self._attention(query, keys, values, visible, self.weights.shape.attention_scale)
            cache.write_(slot, start, key, value)
            return out

        return attend

    def _row_attention(self, cache: LayerCache, slots: Tensor, positions: Tensor) -> Attend:
        """Attention of rows that each see their own slot up to their own position."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.append_(slots, positions, key, value)
            held = positions[:, None] - (positions[:, None] - torch.arange(cache.length, device=slots.device)) % cache.length
            seen = (held >= 0) & (held > positions[:, None] - self.cache.window) if cache.sliding else held >= 0
            out = functional.scaled_dot_product_attention(
                query[:, :, None], cache.keys[slots], cache.values[slots],
                attn_mask=seen[:, None, None], scale=self.weights.shape.attention_scale, enable_gqa=True,
            )  # fmt: skip
            return out[:, :, 0]

        return attend


def _block(x: Tensor, layer: LayerWeights, shape: TextShape, rotation: Rotation, product: Linear, attend: Attend) -> Tensor:
    """One decoder layer on [tokens, hidden]. attend: query [tokens, heads, head_dim], keys and values alike → like query."""
    packed = product(layer.qkv, rms_norm(x, layer.input_norm, shape.eps)).view(x.shape[0], -1, shape.head_dim)
    query, key, value = packed.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    query = rotate(rms_norm(query, layer.query_norm, shape.eps), *rotation)
    key = rotate(rms_norm(key, layer.key_norm, shape.eps), *rotation)
    attended = attend(query, key, value).flatten(1)
    x = x + rms_norm(product(layer.o, attended), layer.post_attention_norm, shape.eps)
    mixed = gated_gelu(product(layer.gate_up, rms_norm(x, layer.pre_mlp_norm, shape.eps)))
    return x + rms_norm(product(layer.down, mixed), layer.post_mlp_norm, shape.eps)
