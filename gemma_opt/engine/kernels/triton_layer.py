# pyright: basic, reportCallIssue=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""What stands between the matrices of a decoder layer, one row of activations a program.

`multiply` leaves partial results; the kernels here add them in order, so a split matrix costs no launch of its own. Where
separate modules would round to the activations' dtype, these round too.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from gemma_opt.engine.kernels.triton_overlap import overlaps, start_next, wait, wait_for_input


@triton.jit
def _embed_kernel(tokens, table, scale, norm, residual, normed, eps, embedding_scale, hidden: tl.constexpr,
                  has_scale: tl.constexpr, block: tl.constexpr, early: tl.constexpr):  # fmt: skip
    wait(early)  # before the next kernel may start: the chain's later kernels read slots and positions early
    start_next(early)
    row = tl.program_id(0)
    token = tl.load(tokens + row)
    d = tl.arange(0, block)
    inside = d < hidden
    x = tl.load(table + token * hidden + d, mask=inside, other=0.0).to(tl.float32)
    if has_scale:
        x = (x * tl.load(scale + token)).to(residual.dtype.element_ty).to(tl.float32)
    x = (x * embedding_scale).to(residual.dtype.element_ty)
    tl.store(residual + row * hidden + d, x, mask=inside)
    _store_normed(x, tl.load(norm + d, mask=inside, other=0.0), normed, row, d, inside, eps, hidden)


@triton.jit(do_not_specialize=["rows"])
def _add_norm_kernel(partial, rows, post_norm, residual, next_norm, normed, eps, splits: tl.constexpr, hidden: tl.constexpr,
                     block: tl.constexpr, early: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    d = tl.arange(0, block)
    inside = d < hidden
    post_factor = tl.load(post_norm + d, mask=inside, other=0.0)
    next_factor = tl.load(next_norm + d, mask=inside, other=0.0)
    wait_for_input(early)
    total = tl.zeros((block,), tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(partial + (split * rows + row) * hidden + d, mask=inside, other=0.0)
    y = total.to(residual.dtype.element_ty).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / hidden + eps) * post_factor
    y = y.to(residual.dtype.element_ty).to(tl.float32)
    x = tl.load(residual + row * hidden + d, mask=inside, other=0.0).to(tl.float32)
    x = (x + y).to(residual.dtype.element_ty)
    tl.store(residual + row * hidden + d, x, mask=inside)
    _store_normed(x, next_factor, normed, row, d, inside, eps, hidden)


@triton.jit
def _store_normed(x, factor, normed, row, d, inside, eps, hidden: tl.constexpr):
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps) * factor
    tl.store(normed + row * hidden + d, x.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def sum_halves(partial, row, rows, head, mask, dtype: tl.constexpr, splits: tl.constexpr, heads: tl.constexpr,
               head_dim: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Heads `head` [n] of a row of partial [splits, rows, heads · head_dim], added up and rounded: two halves [n, block]."""
    half: tl.constexpr = head_dim // 2
    d = tl.arange(0, block)
    inside = mask[:, None] & (d[None, :] < half)
    at = partial + (row * heads + head)[:, None] * head_dim + d[None, :]
    low = tl.zeros((head.shape[0], block), tl.float32)
    high = tl.zeros((head.shape[0], block), tl.float32)
    for split in tl.static_range(splits):
        low += tl.load(at + split * rows * heads * head_dim, mask=inside, other=0.0)
        high += tl.load(at + split * rows * heads * head_dim + half, mask=inside, other=0.0)
    return low.to(dtype), high.to(dtype)


@triton.jit
def load_halves(vector, mask, head_dim: tl.constexpr, block: tl.constexpr):
    """The halves [1, block] of a vector [head_dim] where mask [1, 1] is set, else zeros."""
    d = tl.arange(0, block)[None, :]
    inside = mask & (d < head_dim // 2)
    return tl.load(vector + d, mask=inside, other=0.0), tl.load(vector + head_dim // 2 + d, mask=inside, other=0.0)


@triton.jit
def norm_and_rotate(low, high, norm_low, norm_high, cos, sin, eps, head_dim: tl.constexpr):
    """RMSNorm, then RoPE by cos and sin [1, block], of heads in halves [n, block], rounded to their dtype after each."""
    dtype: tl.constexpr = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    factor = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / head_dim + eps)[:, None]
    first = (low * factor * norm_low).to(dtype).to(tl.float32)
    second = (high * factor * norm_high).to(dtype).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _make_heads_kernel(partial, rows, positions, query_norm, key_norm, cos, sin, made, eps, splits: tl.constexpr,
                       heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr,
                       early: tl.constexpr):  # fmt: skip
    """One head of one row: query heads first, then key heads, then value heads."""
    row = tl.program_id(0)
    head = tl.program_id(1) + tl.arange(0, 1)
    all_heads: tl.constexpr = heads + 2 * kv_heads
    half: tl.constexpr = head_dim // 2
    d = tl.arange(0, block)[None, :]
    is_query, is_value = (head < heads)[:, None], (head >= heads + kv_heads)[:, None]
    query_norms = load_halves(query_norm, is_query, head_dim, block)
    key_norms = load_halves(key_norm, (is_query | is_value) ^ True, head_dim, block)
    wait_for_input(early)
    low, high = sum_halves(partial, row, rows, head, head >= 0, made.dtype.element_ty, splits, all_heads, head_dim, block)
    position = tl.load(positions + row)
    c = tl.load(cos + position * half + d, mask=d < half, other=0.0)
    s = tl.load(sin + position * half + d, mask=d < half, other=0.0)
    first, second = norm_and_rotate(
        low, high, query_norms[0] + key_norms[0], query_norms[1] + key_norms[1], c, s, eps, head_dim
    )
    at = made + (row * all_heads + head)[:, None] * head_dim + d
    tl.store(at, tl.where(is_value, low, first), mask=d < half)
    tl.store(at + half, tl.where(is_value, high, second), mask=d < half)


@triton.jit
def _store_kernel(made, slots, positions, last, keys, values, heads: tl.constexpr, kv_heads: tl.constexpr,
                  head_dim: tl.constexpr, length, block: tl.constexpr, early: tl.constexpr):  # fmt: skip
    """A key and a value head of one row. Rows that a later one would overwrite, and those behind `last`, store nothing."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, block)
    place = tl.load(slots + row) * kv_heads + head
    place = (place * length + tl.load(positions + row) % length) * head_dim + d
    inside = d < head_dim
    if last is not None:
        newest = tl.load(last)
        inside = inside & (row <= newest) & (row > newest - length)
    at = made + (row * (heads + 2 * kv_heads) + heads + head) * head_dim + d
    wait_for_input(early)
    tl.store(keys + place, tl.load(at, mask=inside), mask=inside)
    tl.store(values + place, tl.load(at + kv_heads * head_dim, mask=inside), mask=inside)


def embed(tokens: Tensor, table: Tensor, scale: Tensor | None, norm: Tensor, residual: Tensor, normed: Tensor,
          *, embedding_scale: float, eps: float) -> None:  # fmt: skip
    """residual [rows, hidden] becomes the scaled embeddings of tokens [rows], normed their RMSNorm with `norm`."""
    rows, hidden = residual.shape
    early = overlaps(residual)
    _embed_kernel[(rows,)](
        tokens, table, table if scale is None else scale, norm, residual, normed, eps, embedding_scale,
        hidden=hidden, has_scale=scale is not None, block=triton.next_power_of_2(hidden), num_warps=8,
        early=early, launch_pdl=early,
    )  # fmt: skip


def add_norm(partial: Tensor, post_norm: Tensor, residual: Tensor, next_norm: Tensor, normed: Tensor, *, eps: float) -> None:
    """residual [rows, hidden] += RMSNorm(sum of partial [splits, rows, hidden]); normed becomes the next module's input."""
    splits, rows, hidden = partial.shape
    early = overlaps(residual)
    _add_norm_kernel[(rows,)](
        partial, rows, post_norm, residual, next_norm, normed, eps,
        splits=splits, hidden=hidden, block=triton.next_power_of_2(hidden), num_warps=16,
        early=early, launch_pdl=early,
    )  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """What becomes queries, keys and values.

    partial: [splits, rows, (heads + 2 · kv_heads) · head_dim], whose sum is the qkv product. slots, positions: int64 [rows].
    query_norm, key_norm: [head_dim]. cos, sin: float32 [positions, head_dim / 2]. eps: of the norms.
    """

    partial: Tensor
    slots: Tensor
    positions: Tensor
    query_norm: Tensor
    key_norm: Tensor
    cos: Tensor
    sin: Tensor
    eps: float


def make_heads(given: Heads, made: Tensor, *, kv_heads: int) -> None:
    """Query, key and value heads, the first two normed and rotated: made [rows, heads + 2 · kv_heads, head_dim]."""
    splits, rows, _ = given.partial.shape
    _, all_heads, head_dim = made.shape
    early = overlaps(made)
    _make_heads_kernel[(rows, all_heads)](
        given.partial, rows, given.positions, given.query_norm, given.key_norm, given.cos, given.sin, made, given.eps,
        splits=splits, heads=all_heads - 2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim,
        block=triton.next_power_of_2(head_dim // 2), num_warps=1, early=early, launch_pdl=early,
    )  # fmt: skip


def store_heads(
    made: Tensor, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor, last: Tensor | None = None
) -> None:
    """Put the key and value heads of `make_heads` into the cache.

    slots, positions: int64 [rows]. last: int64 [1], the last row that counts, of rows that are of one slot and follow each
    other; None: all do. keys, values: [slots, kv_heads, length, head_dim], written at position modulo length.
    """
    rows, all_heads, head_dim = made.shape
    _, kv_heads, length, _ = keys.shape
    early = overlaps(made)
    _store_kernel[(rows, kv_heads)](
        made, slots, positions, last, keys, values, heads=all_heads - 2 * kv_heads, kv_heads=kv_heads,
        head_dim=head_dim, length=length, block=triton.next_power_of_2(head_dim), num_warps=1, early=early, launch_pdl=early,
    )  # fmt: skip
