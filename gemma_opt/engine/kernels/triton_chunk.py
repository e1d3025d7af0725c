# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""Attention of a chunk of one slot's prompt: flash attention, masks made on the fly.

Older keys are read where the cache has them, the chunk's own where they were made: once stored, they may lie where a ring
had keys that the chunk still sees. Heads that share keys are rows of one tile. The keys that a tile may see are one run of
positions, which is cut into as many parts as keep the GPU busy; a second kernel joins them. Source: FlashAttention-2 (Dao
2023, arXiv:2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_opt.engine.kernels.triton_attention import BLOCK, SPLITS, THREADS, add_block, join_runs
from gemma_opt.engine.kernels.triton_linear import operand_of
from gemma_opt.engine.kernels.triton_overlap import has_wgmma, overlaps, wait_for_input

LARGE_TILE, SMALL_TILE = 64, 16  # rows
ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of the largest GPU


@triton.jit(do_not_specialize=["tokens"])
def _attend_chunk_kernel(made, slot, positions, pictures, keys, values, most, total, mixed, out, tokens, length, scale,
                         window, heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, splits: tl.constexpr,
                         operand: tl.constexpr, block_rows: tl.constexpr, block_dim: tl.constexpr, block: tl.constexpr,
                         early: tl.constexpr):  # fmt: skip
    """One part of the keys for one tile of rows: those of token 0 first, a row for each head of the KV head."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    shared: tl.constexpr = heads // kv_heads
    all_heads: tl.constexpr = heads + 2 * kv_heads
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    d = tl.arange(0, block_dim)
    token, head = r // shared, kv_head * shared + r % shared
    inside = token < tokens
    begin = tl.load(positions).to(tl.int32)
    position = begin + token
    picture = tl.load(pictures + token, mask=inside, other=0)
    # a picture lies within one chunk: its tokens see nothing behind that
    end = begin + tl.where(tl.max(picture, 0) > 0, tokens, tl.minimum(tl.max(token, 0) + 1, tokens))
    first = tl.maximum(begin + tl.min(token, 0) - window + 1, 0)
    part = tl.cdiv(tl.cdiv(end - first, block), splits) * block
    first += split * part
    last = tl.minimum(first + part, end)
    base = (tl.load(slot) * kv_heads + kv_head) * length * head_dim
    wait_for_input(early)
    q_mask = inside[:, None] & (d[None, :] < head_dim)
    q = tl.load(made + (token * all_heads + head)[:, None] * head_dim + d[None, :], mask=q_mask, other=0.0).to(operand)
    top = tl.full((block_rows,), float("-inf"), tl.float32)
    weight = tl.zeros((block_rows,), tl.float32)
    acc = tl.zeros((block_rows, block_dim), tl.float32)
    while first < last:
        p = first + tl.arange(0, block)
        own = p >= begin
        there = base + p % length * head_dim
        here = made + ((p - begin) * all_heads + heads + kv_head) * head_dim
        mask = (p[:, None] < last) & (d[None, :] < head_dim)
        k_from = tl.where(own, here, keys + there)[:, None]
        v_from = tl.where(own, here + kv_heads * head_dim, values + there)[:, None]
        k = tl.load(k_from + d[None, :], mask=mask, other=0.0).to(operand)
        v = tl.load(v_from + d[None, :], mask=mask, other=0.0).to(operand)  # under way while the scores are computed
        other = tl.load(pictures + p - begin, mask=own & (p < last), other=0)
        seen = (p[None, :] <= position[:, None]) | ((picture[:, None] > 0) & (picture[:, None] == other[None, :]))
        seen = seen & (p[None, :] > position[:, None] - window) & (p[None, :] < last)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen, scores, float("-inf"))
        top, weight, acc = add_block(scores, v, top, weight, acc, operand)
        first += block
    if splits == 1:
        y = acc / tl.where(inside, weight, 1.0)[:, None]
        at = (token * heads + head)[:, None] * head_dim + d[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=q_mask)
    else:
        at = (token * heads + head) * splits + split  # [tokens, heads, splits], and with head_dim behind
        tl.store(most + at, top, mask=inside)
        tl.store(total + at, weight, mask=inside)
        tl.store(mixed + at[:, None] * head_dim + d[None, :], acc, mask=q_mask)


@triton.jit
def _join_kernel(most, total, mixed, out, head_dim: tl.constexpr, splits: tl.constexpr, block_dim: tl.constexpr,
                 early: tl.constexpr):  # fmt: skip
    wait_for_input(early)
    head = tl.program_id(0)  # token · heads + head
    join_runs(most, total, mixed, out, head, splits, 1, head_dim, splits, 1, block_dim)


def attend_to_slot(made: Tensor, slot: Tensor, positions: Tensor, pictures: Tensor, keys: Tensor, values: Tensor,
                   *, scale: float, window: int | None) -> Tensor:  # fmt: skip
    """[tokens, heads · head_dim]: softmax(query · keysᵀ · scale) · values over what each token sees.

    That is positions up to its own, all of its own picture, none further back than the window (None: all). made: the chunk's
    query, key and value heads, [tokens, heads + 2 · kv_heads, head_dim]. keys, values: what the slots hold, the chunk not yet,
    [slots, kv_heads, length, head_dim], position p at p modulo length. slot, positions, pictures: as in `PrefillStep`.
    """
    _, kv_heads, length, head_dim = keys.shape
    tokens, heads = made.shape[0], made.shape[1] - 2 * kv_heads
    early, narrow = overlaps(made), made.dtype.itemsize == 2
    block_rows, splits = cut(tokens * heads // kv_heads, kv_heads, wgmma=has_wgmma(made.device) and narrow)
    block_dim = triton.next_power_of_2(head_dim)
    parts = splits if splits > 1 else 0
    most, total = torch.empty(2, tokens, heads, parts, device=made.device)
    mixed = torch.empty(tokens, heads, parts, head_dim, device=made.device)
    out = torch.empty(tokens, heads * head_dim, dtype=made.dtype, device=made.device)
    _attend_chunk_kernel[(triton.cdiv(tokens * heads // kv_heads, block_rows), kv_heads, splits)](
        made, slot, positions, pictures, keys, values, most, total, mixed, out, tokens, length, scale,
        length if window is None else window, heads=heads, kv_heads=kv_heads, head_dim=head_dim, splits=splits,
        operand=operand_of(made.dtype), block_rows=block_rows, block_dim=block_dim,
        block=BLOCK if narrow else BLOCK // 2, early=early, num_warps=THREADS // 32, launch_pdl=early,
    )  # fmt: skip
    if parts:
        _join_kernel[(tokens * heads,)](
            most, total, mixed, out, head_dim=head_dim, splits=splits, block_dim=block_dim, num_warps=4, early=early,
            launch_pdl=early,
        )  # fmt: skip
    return out


def cut(rows: int, kv_heads: int, *, wgmma: bool) -> tuple[int, int]:
    """Rows of a tile, and parts of the keys: up to SPLITS, so that there are enough programs.

    Large tiles, which read the keys less often, where rows are many and the matrix units (Hopper's, in bfloat16) take them
    from shared memory: others would need more registers than there are.
    """
    block_rows = LARGE_TILE if wgmma and rows >= 4 * LARGE_TILE else SMALL_TILE
    tiles = -(-rows // block_rows) * kv_heads
    return block_rows, min(SPLITS, 1 << (-(-ENOUGH_PROGRAMS // tiles) - 1).bit_length())
