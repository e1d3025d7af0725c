"""The decode step on a GPU: Triton kernels over the packed weights and the static cache, in buffers allocated once.

A layer is seven launches: qkv; attention; o; add and norm; gate, up and GELU; down; add and norm.
Nothing is allocated and nothing waits for the host, so the step can be captured in a CUDA graph, and a row's logits do not
depend on the other rows (up to 16 of them). Runs on the CPU too under Triton's interpreter (TRITON_INTERPRET=1): for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.engine.cache import KvCache, LayerCache
from gemma_opt.engine.kernels import triton_attention
from gemma_opt.engine.kernels.triton_grid import settle
from gemma_opt.engine.kernels.triton_layer import Heads, add_norm, embed, make_heads, store_heads
from gemma_opt.engine.kernels.triton_linear import Matrix, blocks_for, multiply
from gemma_opt.engine.kernels.triton_matrices import TritonLinear, matrix_of, uses_of
from gemma_opt.engine.kernels.triton_tuning import Tuning
from gemma_opt.engine.packed import Int8Rows, LowRankRows, PackedLinear
from gemma_opt.engine.rope import RopeTables
from gemma_opt.engine.weights import LayerWeights, TextWeights
from gemma_opt.recipe import Activation


class TritonDecode:
    """A `DecodeStep` over given weights and cache.

    A call may have as many rows as the cache's slots and slack allow. The logits returned lie in a buffer that the next call
    overwrites. Quantized inputs take one launch more a product, low rank two, a cache with slack two more a layer.
    """

    def __init__(self, weights: TextWeights, cache: KvCache, rope: RopeTables, tuning: Tuning) -> None:
        self._weights, self._cache, self._rope, self._tuning = weights, cache, rope, tuning
        self._rows = cache.slots * (cache.slack + 1)
        self._linear = TritonLinear(tuning)
        self._buffers = _Buffers(weights, uses_of(weights), tuning, self._rows)

    def __call__(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """float32 logits [rows, vocabulary]. tokens, slots, positions: int64 [rows]."""
        rows = tokens.shape[0]
        if rows > self._rows:
            raise ValueError(f"{rows} rows, and the buffers were made for {self._rows}")
        weights, buffers = self._weights, self._buffers
        residual, normed = buffers.residual[:rows], buffers.normed[:rows]
        scale = weights.table.scale if isinstance(weights.table, Int8Rows) else None
        embed(
            tokens, weights.table.weight, scale, weights.layers[0].input_norm, residual, normed,
            embedding_scale=weights.shape.embedding_scale, eps=weights.shape.eps,
        )  # fmt: skip
        next_norms = [layer.input_norm for layer in weights.layers[1:]] + [weights.final_norm]
        for layer, cache, next_norm in zip(weights.layers, self._cache.layers, next_norms, strict=True):
            attended = self._attention(layer, cache, normed, slots, positions)
            self._add_norm(self._multiply(layer.o, attended), layer.post_attention_norm, residual, layer.pre_mlp_norm, normed)
            mixed = self._multiply(layer.gate_up, normed, gated=True)[0]
            self._add_norm(self._multiply(layer.down, mixed), layer.post_mlp_norm, residual, next_norm, normed)
        logits = self._multiply(weights.head, normed)
        return logits[0].float() if len(logits) == 1 else logits.sum(0)

    def _attention(self, layer: LayerWeights, cache: LayerCache, normed: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """What the heads read: [rows, heads · head_dim]. The rows' keys and values are in the cache then."""
        buffers, shape, rows = self._buffers, self._weights.shape, normed.shape[0]
        cos, sin = self._rope.sliding if layer.sliding else self._rope.full
        out, placed = buffers.attended[:rows], self._cache.slack > 0  # rows of one slot read each other's keys
        partial = self._multiply(layer.qkv, normed)
        given = Heads(partial, slots, positions, layer.query_norm, layer.key_norm, cos, sin, shape.eps)
        if placed:
            make_heads(given, buffers.made[:rows], kv_heads=shape.kv_heads)
            store_heads(buffers.made[:rows], slots, positions, cache.keys, cache.values)
        window = shape.window if layer.sliding else None
        triton_attention.attend(
            given, cache.keys, cache.values, out, buffers.scratch, scale=shape.attention_scale, window=window, placed=placed
        )
        return out

    def _add_norm(self, partial: Tensor, post_norm: Tensor, residual: Tensor, next_norm: Tensor, normed: Tensor) -> None:
        add_norm(partial, post_norm, residual, next_norm, normed, eps=self._weights.shape.eps)

    def _multiply(self, product: PackedLinear, x: Tensor, *, gated: bool = False) -> Tensor:
        """Partial results [splits, rows, out] (gated: [1, rows, out / 2]), valid until the next product."""
        if isinstance(product, LowRankRows) and not gated and (right := matrix_of(product.right)):
            return self._multiply(product.left, self._settled(self._partial(right, x), "none", None)[0])
        matrix = matrix_of(product)
        if matrix is None:  # several, whose results are put side by side
            return self._linear.gated(product, x)[None] if gated else self._linear.partial(product, x)
        return self._partial(matrix, x, gated=gated)

    def _partial(self, matrix: Matrix, x: Tensor, *, gated: bool = False) -> Tensor:
        x_scale = None
        if matrix.activation != "none":
            x, x_scale = self._settled(x[None], matrix.activation, matrix.input_scale)
        blocks = self._tuning.blocks(matrix, gated=gated)
        out = self._buffers.product(matrix, blocks.splits, x.shape[0], gated=gated)
        multiply(matrix, x, out, blocks_for(x.shape[0], blocks, x.dtype), x_scale=x_scale, gated=gated)
        return out

    def _settled(self, partial: Tensor, activation: Activation, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        _, rows, width = partial.shape
        steps, scales = self._buffers.steps(rows, width), self._buffers.scales[:rows]
        settle(partial, activation, input_scale, steps, scales)
        return steps, scales


class _Buffers:
    """Every intermediate of a step, for up to `rows` rows. One buffer serves all partial results: each is read at once."""

    def __init__(self, weights: TextWeights, uses: list[tuple[Matrix, bool]], tuning: Tuning, rows: int) -> None:
        shape, dtype, device = weights.shape, weights.dtype, weights.device

        def empty(*sizes: int, like: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=like, device=device)

        self.residual = empty(rows, shape.hidden, like=dtype)
        self.normed = empty(rows, shape.hidden, like=dtype)
        self.attended = empty(rows, shape.heads * shape.head_dim, like=dtype)
        self.made = empty(rows, shape.all_heads, shape.head_dim, like=dtype)
        self.scratch = triton_attention.Scratch.empty(rows, shape.heads, shape.kv_heads, shape.head_dim, device)
        self._gated = empty(rows * max((matrix.out_features // 2 for matrix, gated in uses if gated), default=0), like=dtype)
        widths = (matrix.out_features * tuning.blocks(matrix).splits for matrix, gated in uses if not gated)
        self._partial = empty(rows * max(widths, default=0))
        self._steps = empty(rows * max((matrix.in_features for matrix, _ in uses), default=0), like=dtype)
        self.scales = empty(rows)

    def steps(self, rows: int, width: int) -> Tensor:
        """What a product takes instead of activations [rows, width]; see `triton_grid`."""
        return self._steps[: rows * width].view(rows, width)

    def product(self, matrix: Matrix, splits: int, rows: int, *, gated: bool) -> Tensor:
        """Where a product goes: [splits, rows, out] float32; gated: [1, rows, out / 2] in the activations' dtype."""
        width = matrix.out_features // 2 if gated else matrix.out_features
        flat = self._gated if gated else self._partial
        return flat[: splits * rows * width].view(splits, rows, width)
