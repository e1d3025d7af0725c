# pyright: basic, reportCallIssue=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""Decode attention over static caches: each row sees its own slot up to its own position, and nothing else is read.

A row's valid positions are cut into blocks, the blocks into `splits` runs by a rule that knows the row's position alone,
so a result depends neither on neighbours nor on the batch. A program takes one run for all query heads that share one
KV head; a second kernel joins the runs in order. Source of the two stages: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _attend_kernel(query, slots, positions, keys, values, most, total, mixed, scale, window, heads: tl.constexpr,
                   kv_heads: tl.constexpr, head_dim: tl.constexpr, length: tl.constexpr, splits: tl.constexpr,
                   operand: tl.constexpr, block_heads: tl.constexpr, block_dim: tl.constexpr, block: tl.constexpr,
                   early: tl.constexpr, threads: tl.constexpr):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared: tl.constexpr = heads // kv_heads
    h = tl.arange(0, block_heads)
    d = tl.arange(0, block_dim)
    end = tl.load(positions + row).to(tl.int32) + 1
    begin = tl.maximum(end - window, 0)
    run = (tl.cdiv(end - begin, block) + splits - 1) // splits * block
    first = begin + split * run
    last = tl.minimum(first + run, end)
    some = first < last
    base = (tl.load(slots + row).to(tl.int64) * kv_heads + kv_head) * length
    if early:  # what other steps left in the cache is under way before this one's queries are there
        _prefetch_block(keys, values, base, first, last, length, head_dim, block, threads)
    wait_for_input(early)
    q_place = (row * heads + kv_head * shared + h)[:, None] * head_dim + d[None, :]
    q_mask = (h[:, None] < shared) & (d[None, :] < head_dim)
    q = tl.load(query + q_place, mask=q_mask, other=0.0).to(operand)
    top = tl.full((block_heads,), float("-inf"), tl.float32)
    weight = tl.zeros((block_heads,), tl.float32)
    acc = tl.zeros((block_heads, block_dim), tl.float32)
    while first < last:
        p = first + tl.arange(0, block)
        place = (base + p % length)[:, None] * head_dim + d[None, :]
        mask = (p[:, None] < last) & (d[None, :] < head_dim)
        k = tl.load(keys + place, mask=mask, other=0.0).to(operand)
        v = tl.load(values + place, mask=mask, other=0.0).to(operand)  # under way while the scores are computed
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(p[None, :] < last, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp(scores - new_top[:, None])
        fade = tl.exp(top - new_top)
        acc = acc * fade[:, None] + tl.dot(shares.to(operand), v, input_precision="ieee")
        weight = weight * fade + tl.sum(shares, 1)
        top = new_top
        first += block
    # [rows, heads, splits], and with head_dim behind
    at = (row * heads + kv_head * shared + h) * splits + split
    tl.store(most + at, top, mask=h < shared)
    tl.store(total + at, weight, mask=h < shared)
    if some:  # the join leaves empty runs out
        tl.store(mixed + at[:, None] * head_dim + d[None, :], acc, mask=q_mask)


@triton.jit
def _join_kernel(most, total, mixed, out, head_dim: tl.constexpr, splits: tl.constexpr, block_dim: tl.constexpr,
                 early: tl.constexpr):  # fmt: skip
    wait_for_input(early)
    at = tl.program_id(0)  # row · heads + head
    d = tl.arange(0, block_dim)
    s = tl.arange(0, splits)
    top = tl.load(most + at * splits + s)
    factor = tl.exp(top - tl.max(top, 0))
    norm = tl.sum(factor * tl.load(total + at * splits + s), 0)
    mask = (factor[:, None] > 0) & (d[None, :] < head_dim)
    parts = tl.load(mixed + (at * splits + s)[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
    y = tl.sum(factor[:, None] * parts, 0) / norm
    tl.store(out + at * head_dim + d, y.to(out.dtype.element_ty), mask=d < head_dim)


@dataclass(frozen=True)
class Scratch:
    """What the runs leave for the join, float32: greatest score and sum [rows, heads, SPLITS], mix [.., SPLITS, head_dim]."""

    most: Tensor
    total: Tensor
    mixed: Tensor

    @staticmethod
    def empty(rows: int, heads: int, head_dim: int, device: torch.device) -> Scratch:
        """For up to `rows` rows."""
        sizes = (rows, heads, SPLITS)
        return Scratch(
            torch.empty(sizes, device=device), torch.empty(sizes, device=device), torch.empty(*sizes, head_dim, device=device)
        )


def attend(query: Tensor, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor, out: Tensor, scratch: Scratch,
           *, scale: float, window: int | None) -> None:  # fmt: skip
    """out [rows, heads · head_dim] = softmax(query · keysᵀ · scale) · values over positions (p − window, p], p the row's own.

    query: [rows, heads, head_dim]. keys, values: [slots, kv_heads, length, head_dim], position p at p modulo length; the
    row's own position is stored already. slots, positions: int64 [rows], positions ≥ 0. window None: all positions.
    """
    rows, heads, head_dim = query.shape
    _, kv_heads, length, _ = keys.shape
    early = overlaps(query)
    block_dim = triton.next_power_of_2(head_dim)
    block = BLOCK if query.dtype.itemsize == 2 else BLOCK // 2  # float32 keys and values have to fit an L40S too
    _attend_kernel[(rows, kv_heads, SPLITS)](
        query, slots, positions, keys, values, scratch.most, scratch.total, scratch.mixed, scale,
        length if window is None else window, heads=heads, kv_heads=kv_heads, head_dim=head_dim, length=length, splits=SPLITS,
        operand=operand_of(query.dtype), block_heads=max(16, triton.next_power_of_2(heads // kv_heads)), block_dim=block_dim,
        block=block, early=early, threads=THREADS, num_warps=THREADS // 32, num_stages=2, launch_pdl=early,
    )  # fmt: skip
    _join_kernel[(rows * heads,)](
        scratch.most, scratch.total, scratch.mixed, out, head_dim=head_dim, splits=SPLITS, block_dim=block_dim, num_warps=4,
        early=early, launch_pdl=early,
    )  # fmt: skip
