# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""The sampler's levels GREEDY and NARROW in two launches: the tokens of `sampling.next_tokens`, fed into the batch at once.

The first launch leaves the best of every chunk of logits, the second, one program a row, draws. A logit and its token id are
one int64 key, as in `sampling.best`: keys are never equal and order as logits do, the lower id first among equals, so that
"the NARROW best" is one set and bisection ends at exactly that many. Nothing is sorted: the candidates' ranks and the
probability above each come from comparing all with all. Higher levels stay with torch operations.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_opt.engine.batch import Batch, Level
from gemma_opt.engine.kernels.triton_overlap import overlaps, wait_for_input
from gemma_opt.engine.sampling import CHUNK, NARROW, Route

PIECE = 32  # chunks a program of the first launch reads: 262,208 logits are 129 programs, which an H100 runs at once
WARPS = {Level.GREEDY: 1, Level.NARROW: 16}  # of a row's program: it looks at one key a piece, or at one a chunk
NOTHING = tl.constexpr(-(2**63))  # below every key: the ids of tokens end before 2**32 - 1
HIGHEST = tl.constexpr(2**63 - 1)
LOW_HALF = tl.constexpr(0xFFFFFFFF)
NARROW_ROUTE = tl.constexpr(int(Route.NARROW))


@triton.jit
def _key_of(value, token):
    """float32 and token id → int64 that orders as the value does, and among equals the lower id above the higher."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (LOW_HALF - token.to(tl.int64))


@triton.jit
def _value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _token_of(key):
    return LOW_HALF - (key & LOW_HALF)


@triton.jit
def _load_keys(logits, token, inside, stop_ids, held, stops: tl.constexpr):
    """Keys of one row's tokens, NOTHING outside. held: whether this row may not stop yet, so that stop tokens get −inf."""
    value = tl.load(logits + token, mask=inside, other=0.0)
    for stop in tl.static_range(stops):
        value = tl.where(held & (token == tl.load(stop_ids + stop)), float("-inf"), value)
    return tl.where(inside, _key_of(value, token), NOTHING)


@triton.jit
def _maxima_kernel(logits, stride, slots, positions, stops_from, stop_ids, best, vocabulary: tl.constexpr,
                   stops: tl.constexpr, chunk: tl.constexpr, piece: tl.constexpr, by_chunk: tl.constexpr,
                   early: tl.constexpr):  # fmt: skip
    """best [rows, chunks] or, without `by_chunk`, [rows, pieces]: the greatest key of each."""
    wait_for_input(early)
    row, at = tl.program_id(0), tl.program_id(1)
    chunks: tl.constexpr = (vocabulary + chunk - 1) // chunk
    pieces: tl.constexpr = (chunks + piece - 1) // piece
    held = tl.load(positions + row) + 1 < tl.load(stops_from + tl.load(slots + row))
    number = at * piece + tl.arange(0, piece)
    token = number[:, None] * chunk + tl.arange(0, chunk)[None, :]
    key = tl.max(_load_keys(logits + row * stride, token, token < vocabulary, stop_ids, held, stops), 1)
    if by_chunk:
        tl.store(best + row * chunks + number, key, mask=number < chunks)
    else:
        tl.store(best + row * pieces + at, tl.max(key, 0))


@triton.jit
def _greedy_kernel(best, slots, positions, last_tokens, last_positions, seen, tokens, vocabulary: tl.constexpr,
                   pieces: tl.constexpr, block: tl.constexpr, early: tl.constexpr):  # fmt: skip
    """The best token of a row. best: [rows, pieces]."""
    wait_for_input(early)
    row = tl.program_id(0)
    slot, position = tl.load(slots + row), tl.load(positions + row) + 1
    number = tl.arange(0, block)
    key = tl.max(tl.load(best + row * pieces + number, mask=number < pieces, other=NOTHING), 0)
    _feed(_token_of(key), row, slot, position, last_tokens, last_positions, seen, tokens, vocabulary)


@triton.jit
def _narrow_kernel(logits, stride, best, picked, slots, positions, stops_from, stop_ids, route, temperature, top_k, top_p,
                   min_p, seed, last_tokens, last_positions, seen, tokens, vocabulary: tl.constexpr, stops: tl.constexpr,
                   chunk: tl.constexpr, width: tl.constexpr, block: tl.constexpr, early: tl.constexpr):  # fmt: skip
    """The `width` best tokens of a row lie in the `width` chunks with the greatest maxima; then the race among them.

    best: [rows, chunks]. picked: scratch, [rows, 2, width].
    """
    wait_for_input(early)
    row = tl.program_id(0)
    chunks: tl.constexpr = (vocabulary + chunk - 1) // chunk
    slot, position = tl.load(slots + row), tl.load(positions + row) + 1
    held = position < tl.load(stops_from + slot)
    sampled, temperature, top_k = tl.load(route + slot) == NARROW_ROUTE, tl.load(temperature + slot), tl.load(top_k + slot)
    top_p, min_p, seed = tl.load(top_p + slot), tl.load(min_p + slot), tl.load(seed + slot)
    number = tl.arange(0, block)
    maxima = tl.load(best + row * chunks + number, mask=number < chunks, other=NOTHING)
    chosen = picked + row * 2 * width
    least = tl.min(tl.where(maxima == NOTHING, HIGHEST, maxima), 0)
    found, least = _pick_best(maxima, least, chosen, width)

    place = tl.arange(0, width * chunk)
    taken = place // chunk < found
    maximum = tl.load(chosen + place // chunk, mask=taken, other=0)
    token = tl.where(taken, _token_of(maximum) // chunk * chunk + place % chunk, vocabulary)
    keys = _load_keys(logits + row * stride, token, token < vocabulary, stop_ids, held, stops)
    # `width` maxima are `width` tokens: the best are not below the least of them. Fewer chunks are all there are.
    found, least = _pick_best(keys, tl.where(found == width, least, NOTHING + 1), chosen + width, width)

    order = tl.arange(0, width)
    key = tl.load(chosen + width + order, mask=order < found, other=NOTHING)
    top = tl.max(key, 0)
    winner = _race(key, top, position, temperature, top_k, top_p, min_p, seed)
    winner = tl.where(sampled & (winner != NOTHING), winner, top)
    _feed(_token_of(winner), row, slot, position, last_tokens, last_positions, seen, tokens, vocabulary)


@triton.jit
def _pick_best(keys, least, picked, width: tl.constexpr):
    """Store the `width` greatest keys, or all, in any order; returns how many and a bound: none of them is less.

    least: no key that counts is less, and at least `width` are not, if there are that many. Bisection of the bound, which
    ends at the first that parts the best from the rest; the program's threads see what was stored.
    """
    above = tl.max(keys, 0) + 1
    found = tl.sum((keys >= least).to(tl.int32), 0)
    while found > width:
        middle = (least & above) + ((least ^ above) >> 1)
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = count >= width
        least = tl.where(enough, middle, least)
        above = tl.where(enough, above, middle)
        found = tl.where(enough, count, found)
    good = keys >= least
    tl.store(picked + tl.cumsum(good.to(tl.int32), 0) - 1, keys, mask=good)
    tl.debug_barrier()
    return found, least


@triton.jit
def _race(key, top, position, temperature, top_k, top_p, min_p, seed):
    """The key that `sampling`'s race picks among candidates in any order; NOTHING where none is kept. key: [width].

    top: the greatest, which is not kept where top_p is 0 or where it is not a number; it wins all the same.
    A candidate's rank and the probability before it are sums over those with greater keys.
    """
    there = key != NOTHING
    weight = tl.where(there, tl.exp((_value_of(key) - _value_of(top)).to(tl.float64) / temperature.to(tl.float64)), 0.0)
    before = key[None, :] > key[:, None]
    rank = tl.sum(before.to(tl.int32), 1)
    kept = tl.where(rank < top_k, weight, 0.0)
    mass_before = tl.sum(tl.where(before, kept[None, :], 0.0), 1)
    keep = (rank < top_k) & (mass_before < top_p.to(tl.float64) * tl.sum(kept, 0)) & (weight >= min_p.to(tl.float64))
    keep = keep & (weight > 0)  # what weighs nothing loses every race
    noise = _exponential_noise(seed, position, _token_of(key)).to(tl.float64)
    race = tl.where(keep, noise / tl.where(keep, weight, 1.0), float("inf"))
    return tl.max(tl.where(keep & (race == tl.min(race, 0)), key, NOTHING), 0)


@triton.jit
def _exponential_noise(seed, position, token):
    """`sampling.exponential_noise`: float32 of int64."""
    bits = _mix64(token ^ _mix64(position ^ _mix64(seed)))
    uniform = ((bits & 0x7FFFFF).to(tl.float32) + 0.5) * (2**-23)
    return -tl.log(uniform)


@triton.jit
def _mix64(value):
    """`sampling.mix64`: the masks make arithmetic shifts logical ones."""
    value = value + -0x61C8864680B583EB
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


@triton.jit
def _feed(token, row, slot, position, last_tokens, last_positions, seen, tokens, vocabulary: tl.constexpr):
    """What `Batch.feed` does, and the row's result. The kernels read nothing of this: two rows may have one slot."""
    tl.store(tokens + row, token)
    tl.store(last_tokens + slot, token)
    tl.store(last_positions + slot, position)
    tl.store(seen + slot * vocabulary + token, 1)


class TritonSampler:
    """A `Sampler` of level GREEDY or NARROW for a batch. Its tokens lie in a buffer that the next call overwrites."""

    def __init__(self, batch: Batch, level: Level) -> None:
        slots, vocabulary = batch.seen.shape
        self._batch, self._level = batch, level
        self._seen = batch.seen.view(torch.uint8)
        self._chunks = -(-vocabulary // CHUNK)
        self._pieces = -(-self._chunks // PIECE)
        whole = partial(torch.empty, dtype=torch.int64, device=batch.tokens.device)
        self._tokens = whole(slots)
        self._best = whole(slots, self._pieces if level is Level.GREEDY else self._chunks)
        self._picked = whole(slots, 2, NARROW)

    def __call__(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """int64 [rows], fed into the batch. See `batch.Sampler`."""
        rows, vocabulary = logits.shape
        if rows > len(self._tokens) or logits.stride(1) != 1:
            raise ValueError(f"logits {tuple(logits.shape)}, strides {logits.stride()}: at most {len(self._tokens)} whole rows")
        batch, early = self._batch, overlaps(logits)
        stops = len(batch.stop_ids)
        _maxima_kernel[(rows, self._pieces)](
            logits, logits.stride(0), slots, positions, batch.stops_from, batch.stop_ids, self._best, vocabulary=vocabulary,
            stops=stops, chunk=CHUNK, piece=PIECE, by_chunk=self._level is Level.NARROW, num_warps=4,
            early=early, launch_pdl=early,
        )  # fmt: skip
        feed = batch.tokens, batch.positions, self._seen, self._tokens
        if self._level is Level.GREEDY:
            _greedy_kernel[(rows,)](
                self._best, slots, positions, *feed, vocabulary=vocabulary, pieces=self._pieces,
                block=triton.next_power_of_2(self._pieces), num_warps=WARPS[self._level], early=early, launch_pdl=early,
            )  # fmt: skip
        else:
            wanted = batch.rows
            _narrow_kernel[(rows,)](
                logits, logits.stride(0), self._best, self._picked, slots, positions, batch.stops_from, batch.stop_ids,
                wanted.route, wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p, wanted.seed, *feed,
                vocabulary=vocabulary, stops=stops, chunk=CHUNK, width=NARROW, block=triton.next_power_of_2(self._chunks),
                num_warps=WARPS[self._level], early=early, launch_pdl=early,
            )  # fmt: skip
        return self._tokens[:rows]
