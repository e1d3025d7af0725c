# pyright: basic, reportCallIssue=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""Decode attention over static caches, from the qkv product to what the heads read: one launch.

A row sees its own slot up to its own position, and nothing else is read. Its valid positions are cut into blocks, the blocks
into runs by a rule that knows the row's position alone, so a result depends neither on neighbours nor on the batch. A program
takes one run for all query heads that share one KV head; it makes their queries itself, and that of the last run the new key
and value. The program of a row and KV head that ends last joins the runs, in order. Source of the two stages: Flash-Decoding
(Dao et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_opt.engine.kernels.triton_layer import Heads, load_halves, norm_and_rotate, sum_halves
from gemma_opt.engine.kernels.triton_linear import operand_of
from gemma_opt.engine.kernels.triton_overlap import overlaps, prefetch, wait_for_input

SPLITS = 16  # a window of 1,024 is then one block a run
BLOCK = 64  # positions
THREADS = 256


@triton.jit
def _prefetch_block(keys, values, base, first, last, length: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr,
                    threads: tl.constexpr):  # fmt: skip
    """Have the keys and values of a run's first block fetched into the L2 cache; every thread asks for a piece of a row."""
    row_bytes: tl.constexpr = head_dim * keys.dtype.element_ty.primitive_bitwidth // 8
    pieces: tl.constexpr = (threads + 2 * block - 1) // (2 * block)
    if row_bytes % (16 * pieces) == 0:
        index = tl.arange(0, 2 * block * pieces)
        position = first + index // pieces % block
        place = (base + position % length).to(tl.int64) * row_bytes + index % pieces * (row_bytes // pieces)
        start = tl.where(index < block * pieces, keys.to(tl.int64), values.to(tl.int64)) + place
        prefetch(tl.where(position < last, start, keys.to(tl.int64)), row_bytes // pieces)


@triton.jit
def add_block(scores, v, top, weight, acc, operand: tl.constexpr):
    """The online softmax over one block more: greatest score and sum [rows], mix of values [rows, head_dim].

    scores: [rows, positions], −∞ where a row does not see one; a row may see none. v: [positions, head_dim].
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top > float("-inf"), new_top, 0.0)
    shares = tl.exp(scores - finite[:, None])
    fade = tl.exp(top - finite)
    acc = acc * fade[:, None] + tl.dot(shares.to(operand), v, input_precision="ieee")
    return new_top, weight * fade + tl.sum(shares, 1), acc


@triton.jit(do_not_specialize=["rows"])
def _attend_kernel(partial, rows, slots, positions, query_norm, key_norm, cos, sin, eps, keys, values, most, total, mixed,
                   ended, out, scale, window, placed: tl.constexpr, qkv_splits: tl.constexpr, heads: tl.constexpr,
                   kv_heads: tl.constexpr, head_dim: tl.constexpr, length: tl.constexpr, splits: tl.constexpr,
                   operand: tl.constexpr, block_shared: tl.constexpr, block_heads: tl.constexpr, block_half: tl.constexpr,
                   block: tl.constexpr, early: tl.constexpr, threads: tl.constexpr):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = out.dtype.element_ty
    all_heads: tl.constexpr = heads + 2 * kv_heads
    shared: tl.constexpr = heads // kv_heads
    half: tl.constexpr = head_dim // 2
    h = tl.arange(0, block_heads)
    low_d = tl.arange(0, block_half)
    part_of_half = tl.arange(0, 2 * block_half) % block_half  # two halves, also where those are no powers of 2
    d = tl.arange(0, 2 * block_half) // block_half * half + part_of_half
    inside = part_of_half < half
    position = tl.load(positions + row).to(tl.int32)
    begin = tl.maximum(position + 1 - window, 0)
    run = (tl.cdiv(position + 1 - begin, block) + splits - 1) // splits * block
    first = begin + split * run
    last = tl.minimum(first + run, position + 1)
    base = (tl.load(slots + row).to(tl.int64) * kv_heads + kv_head) * length
    if early:  # what other steps left in the cache is under way before this one's queries are there
        _prefetch_block(keys, values, base, first, last, length, head_dim, block, threads)
    own = (last > position) & (not placed)  # the key and value of the row's own position come from here
    is_key = h == shared  # a row of the tile below the queries
    always = tl.full((1, 1), True, tl.int1)
    query_norms = load_halves(query_norm, always, head_dim, block_half)
    key_norms = load_halves(key_norm, always, head_dim, block_half)
    norm_low = tl.where(is_key[:, None], key_norms[0], query_norms[0])
    norm_high = tl.where(is_key[:, None], key_norms[1], query_norms[1])
    c = tl.load(cos + position * half + low_d, mask=low_d < half, other=0.0)[None, :]
    s = tl.load(sin + position * half + low_d, mask=low_d < half, other=0.0)[None, :]
    wait_for_input(early)
    if first > position:
        return
    head = tl.where(is_key, heads + kv_head, kv_head * shared + h)
    low, high = sum_halves(partial, row, rows, head, (h < shared) | (is_key & own), dtype, qkv_splits, all_heads, head_dim,
                           block_half)  # fmt: skip
    value = tl.zeros((2 * block_half,), tl.float32)
    for part in tl.static_range(qkv_splits):
        at = ((part * rows + row) * all_heads + heads + kv_heads + kv_head) * head_dim
        value += tl.load(partial + at + d, mask=inside & own, other=0.0)
    value = value.to(dtype)
    low, high = norm_and_rotate(low, high, norm_low, norm_high, c, s, eps, head_dim)
    key_low = tl.sum(tl.where(is_key[:, None], low.to(tl.float32), 0.0), 0)
    key_high = tl.sum(tl.where(is_key[:, None], high.to(tl.float32), 0.0), 0)
    own_place = (base + position % length) * head_dim
    tl.store(keys + own_place + low_d, key_low.to(dtype), mask=(low_d < half) & own)
    tl.store(keys + own_place + half + low_d, key_high.to(dtype), mask=(low_d < half) & own)
    tl.store(values + own_place + d, value, mask=inside & own)
    scores_of_own = tl.sum(low.to(tl.float32) * key_low[None, :] + high.to(tl.float32) * key_high[None, :], 1) * scale
    top = tl.where(own, scores_of_own, float("-inf"))
    weight = tl.zeros((block_heads,), tl.float32) + tl.where(own, 1.0, 0.0)
    acc = tl.zeros((block_heads, 2 * block_half), tl.float32) + value.to(tl.float32)[None, :]
    last = tl.where(own, position, last)
    query = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (block_heads, 2 * block_half)).to(operand)
    while first < last:
        p = first + tl.arange(0, block)
        place = (base + p % length)[:, None] * head_dim + d[None, :]
        mask = (p[:, None] < last) & inside[None, :]
        k = tl.load(keys + place, mask=mask, other=0.0).to(operand)
        v = tl.load(values + place, mask=mask, other=0.0).to(operand)  # under way while the scores are computed
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(p[None, :] < last, scores, float("-inf"))
        top, weight, acc = add_block(scores, v, top, weight, acc, operand)
        first += block
    # [rows, heads, splits], and with head_dim behind
    head = row * heads + kv_head * shared + h
    tl.store(most + head * splits + split, top, mask=h < shared)
    tl.store(total + head * splits + split, weight, mask=h < shared)
    tl.store(mixed + (head * splits + split)[:, None] * head_dim + d[None, :], acc,
             mask=(h[:, None] < shared) & inside[None, :])  # fmt: skip
    tl.debug_barrier()  # all threads have stored before one says so
    runs = tl.cdiv(position + 1 - begin, run)
    if tl.atomic_add(ended + row * kv_heads + kv_head, 1, sem="acq_rel") == runs - 1:
        tl.store(ended + row * kv_heads + kv_head, 0)  # for the next launch
        join_runs(most, total, mixed, out, row * heads + kv_head * shared, runs, shared, head_dim, splits, block_shared,
                  2 * block_half)  # fmt: skip


@triton.jit
def join_runs(most, total, mixed, out, first_head, runs, shared: tl.constexpr, head_dim: tl.constexpr, splits: tl.constexpr,
              block_shared: tl.constexpr, block_dim: tl.constexpr):  # fmt: skip
    """Of the heads that share a KV head. Reads past the first cache, which may hold what another launch had left there."""
    h = tl.minimum(tl.arange(0, block_shared), shared - 1)  # the last one again instead of heads that are not there
    s = tl.arange(0, splits)[None, :]
    d = tl.arange(0, block_dim)
    at = (first_head + h)[:, None] * splits + s
    ended = s < runs
    top = tl.load(most + at, mask=ended, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(total + at, mask=ended, other=0.0, cache_modifier=".cg")
    inside = ended[:, :, None] & (d[None, None, :] < head_dim)
    parts = tl.load(mixed + at[:, :, None] * head_dim + d[None, None, :], mask=inside, other=0.0, cache_modifier=".cg")
    factor = tl.exp(top - tl.max(top, 1)[:, None])
    y = tl.sum(factor[:, :, None] * parts, 1) / tl.sum(factor * sums, 1)[:, None]
    place = out + (first_head + h)[:, None] * head_dim + d[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=d[None, :] < head_dim)


@dataclass(frozen=True)
class Scratch:
    """What the runs leave for the join.

    Float32: greatest score and sum [rows, heads, SPLITS], mix [rows, heads, SPLITS, head_dim]. ended: int32 [rows, kv_heads],
    the runs that have ended; zeros between launches.
    """

    most: Tensor
    total: Tensor
    mixed: Tensor
    ended: Tensor

    @staticmethod
    def empty(rows: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> Scratch:
        """For up to `rows` rows."""
        sizes = (rows, heads, SPLITS)
        return Scratch(
            torch.empty(sizes, device=device), torch.empty(sizes, device=device),
            torch.empty(*sizes, head_dim, device=device), torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
        )  # fmt: skip


def attend(given: Heads, keys: Tensor, values: Tensor, out: Tensor, scratch: Scratch, *, scale: float, window: int | None,
           placed: bool) -> None:  # fmt: skip
    """out [rows, heads · head_dim] = softmax(query · keysᵀ · scale) · values over positions (p − window, p], p the row's own.

    keys, values: [slots, kv_heads, length, head_dim], position p at p modulo length. window None: all positions. placed:
    `store_heads` has stored the rows' keys and values; else that is done here, and no two rows may be of one slot unless they
    are the same.
    """
    splits, rows, _ = given.partial.shape
    _, kv_heads, length, head_dim = keys.shape
    heads = out.shape[1] // head_dim
    early = overlaps(out)
    block_shared = triton.next_power_of_2(heads // kv_heads)
    _attend_kernel[(rows, kv_heads, SPLITS)](
        given.partial, rows, given.slots, given.positions, given.query_norm, given.key_norm, given.cos, given.sin, given.eps,
        keys, values, scratch.most, scratch.total, scratch.mixed, scratch.ended, out, scale,
        length if window is None else window, placed=placed, qkv_splits=splits, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, length=length, splits=SPLITS, operand=operand_of(out.dtype), block_shared=block_shared,
        block_heads=max(16, triton.next_power_of_2(heads // kv_heads + 1)),
        block_half=max(16, triton.next_power_of_2(head_dim // 2)),
        block=BLOCK if out.dtype.itemsize == 2 else BLOCK // 2,  # float32 keys and values have to fit an L40S too
        early=early, threads=THREADS, num_warps=THREADS // 32, num_stages=2, launch_pdl=early,
    )  # fmt: skip
