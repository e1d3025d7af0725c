"""Logits → the next tokens of several rows, without sorting the vocabulary and without asking the host.

Filters apply in transformers' order: repetition penalty, temperature, top-k, top-p, min-p. The draw is the exponential
race: token i wins with the smallest E_i / p_i, which samples exactly from p. E_i comes from a counter-based generator of
(seed, position, token), so a reply depends on its seed alone, not on its neighbours, the device or what was drawn before.

What a row asks for decides its route, and the route alone decides how the row is computed, so that a row gets the same
bits alone and beside others. All shapes are static: `next_tokens` can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor

from gemma_opt.engine.interface import SamplingParams

CHUNK = 64  # columns searched together: 262,144 = 64 × 4096
NARROW, WIDE = 64, 1024  # candidates kept: the default top_k 50 and the largest, 1000, fit
BISECTION_STEPS = 40  # halvings of the top-p threshold: below float32 resolution of probabilities
COLDEST = 1e-6  # below, scores divided by the temperature leave float32, and nothing but the best token could be drawn


class Route(IntEnum):
    """How a row's token is found, from the cheapest to the dearest."""

    GREEDY = 0
    NARROW = 1  # top-k of at most NARROW: all filters work on that many candidates
    WIDE = 2  # the same with WIDE candidates
    WHOLE = 3  # no top-k, no top-p: the race runs over the vocabulary
    NUCLEUS = 4  # top-p without top-k: a threshold over the vocabulary is searched for


def route_of(sampling: SamplingParams) -> Route:
    """The route of one request's rows."""
    if sampling.temperature < COLDEST:
        return Route.GREEDY
    if sampling.top_k:
        return Route.NARROW if sampling.top_k <= NARROW else Route.WIDE
    return Route.NUCLEUS if sampling.top_p < 1 else Route.WHOLE


@dataclass(frozen=True)
class SamplingRows:
    """Parameters of [rows] rows as tensors on the logits' device."""

    route: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    seed: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> SamplingRows:
        """Greedy rows, to be filled by `set_`."""
        floats = {name: torch.ones(rows, device=device) for name in ("temperature", "top_p", "min_p", "penalty")}
        whole = {name: torch.zeros(rows, dtype=torch.int64, device=device) for name in ("route", "top_k", "seed")}
        return cls(**floats, **whole)

    @classmethod
    def of(cls, samplings: Sequence[SamplingParams], device: torch.device) -> SamplingRows:
        """One row per request."""
        rows = cls.empty(len(samplings), device)
        for row, sampling in enumerate(samplings):
            rows.set_(row, sampling)
        return rows

    def set_(self, row: int, sampling: SamplingParams) -> None:
        """Write one request's parameters into its row."""
        self.route[row] = route_of(sampling)
        self.temperature[row] = sampling.temperature or 1.0
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.penalty[row] = sampling.repetition_penalty
        self.seed[row] = sampling.seed

    def take(self, index: Tensor) -> SamplingRows:
        """The rows of an index tensor, in its order."""
        return SamplingRows(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def next_tokens(scores: Tensor, rows: SamplingRows, positions: Tensor, routes: Collection[Route]) -> Tensor:
    """The next token of every row: int64 [rows]. Each of `routes` is computed for all rows, then each row takes its own.

    scores: [rows, vocabulary] float32, penalties applied. positions: [rows], index of the new token in its sequence, the
    counter of the random numbers. routes: at least those that occur in `rows`.
    """
    tokens = best_tokens(scores)
    for route in sorted(set(routes) - {Route.GREEDY}):
        tokens = torch.where(rows.route == route, _FINDERS[route](scores, rows, positions), tokens)
    return tokens


def next_tokens_apart(scores: Tensor, rows: SamplingRows, positions: Tensor, routes: Sequence[Route]) -> Tensor:
    """The same tokens, each row paying for its own route only. routes: of each row, as the host knows them.

    Routes that pass over the vocabulary many times take one row after another, which stays in the processor's cache.
    """
    groups: list[tuple[Route, list[int]]] = []
    for route in sorted(set(routes)):
        members = [row for row, wanted in enumerate(routes) if wanted == route]
        groups += [(route, members)] if route <= Route.NARROW else [(route, [row]) for row in members]
    if len(groups) == 1:
        return _find_apart(groups[0][0], scores, rows, positions)
    tokens = torch.empty(len(routes), dtype=torch.int64, device=scores.device)
    for route, members in groups:
        index = torch.tensor(members, device=scores.device)
        tokens[index] = _find_apart(route, scores[index], rows.take(index), positions[index])
    return tokens


def _find_apart(route: Route, scores: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    few = _race_of_few(scores, rows, positions) if route > Route.WIDE else None
    return _FINDERS[route](scores, rows, positions) if few is None else few


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative scores of seen tokens by the row's penalty. Source: Keskar et al. 2019, CTRL.

    scores: [rows, vocabulary]; seen: the same shape, bool; penalty: [rows].
    """
    factor = penalty[:, None]
    return torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores)


# The routes


def best_tokens(scores: Tensor) -> Tensor:
    """The most probable token of each row, the lowest index among equals. [rows, vocabulary] → int64 [rows]."""
    return best(scores, 1)[1][:, 0]


def _race_of_candidates(width: int) -> Callable[[Tensor, SamplingRows, Tensor], Tensor]:
    def find(scores: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
        values, ids = best(scores, width)
        # In float64 a sum over few candidates and one over many differ by less than any threshold can tell.
        weights = torch.exp((values - values[:, :1]).double() / rows.temperature[:, None])
        keep = keep_candidates(weights, rows.top_k, rows.top_p, rows.min_p)
        race = exponential_noise(rows.seed, positions, ids) / weights
        winner = race.masked_fill(~keep, torch.inf).argmin(-1, keepdim=True)
        return ids.gather(1, winner)[:, 0]

    return find


def _race_of_all(scores: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    return _race(torch.softmax(scores / rows.temperature[:, None], -1), rows, positions)


def _race_of_nucleus(scores: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    probabilities = torch.softmax(scores / rows.temperature[:, None], -1)
    return _race(
        probabilities.masked_fill(probabilities < nucleus_threshold(probabilities, rows.top_p)[:, None], 0), rows, positions
    )


def _race_of_few(scores: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor | None:
    """What the races without top-k find, where the WIDE best tokens hold all that may be drawn; None where they do not.

    Asks the host, so no captured step may use it. The nucleus is that of the whole vocabulary: its smallest probability is
    above the last candidate's, and what shares it is kept.
    """
    _, ids = best(scores, WIDE)
    probabilities = torch.softmax(scores / rows.temperature[:, None], -1).gather(1, ids)
    enough = probabilities.cumsum(-1) >= rows.top_p[:, None]
    last = torch.where(rows.top_p < 1, enough.int().argmax(-1), ids.shape[-1] - 1)[:, None]  # argmax: the first that is
    least = torch.maximum(probabilities.gather(1, last), rows.min_p[:, None] * probabilities[:, :1])
    if not bool((least > probabilities[:, -1:]).all() & (enough.any(-1) | (rows.top_p == 1)).all()):
        return None
    race = exponential_noise(rows.seed, positions, ids) / probabilities
    winner = race.masked_fill(probabilities < least, torch.inf).argmin(-1, keepdim=True)
    return ids.gather(1, winner)[:, 0]


def _race(probabilities: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """min-p, then the race over the whole vocabulary."""
    keep = probabilities >= rows.min_p[:, None] * probabilities.amax(-1, keepdim=True)
    ids = torch.arange(probabilities.shape[-1], device=probabilities.device)[None]
    race = exponential_noise(rows.seed, positions, ids) / probabilities
    return race.masked_fill(~keep, torch.inf).argmin(-1)


_FINDERS: dict[Route, Callable[[Tensor, SamplingRows, Tensor], Tensor]] = {
    Route.GREEDY: lambda scores, _rows, _positions: best_tokens(scores),
    Route.NARROW: _race_of_candidates(NARROW),
    Route.WIDE: _race_of_candidates(WIDE),
    Route.WHOLE: _race_of_all,
    Route.NUCLEUS: _race_of_nucleus,
}


# What they are made of


def keep_candidates(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Mask of the candidates that may be drawn. weights: [rows, width], descending, the first 1; the rest: [rows].

    top-k keeps the first k; top-p then the smallest set of the first ones whose share of what top-k left reaches p;
    min-p those at least min_p as probable as the first. The first always stays.
    """
    order = torch.arange(weights.shape[-1], device=weights.device)[None]
    keep = order < top_k[:, None]
    kept = torch.where(keep, weights, 0.0)
    sums = kept.cumsum(-1)
    keep = keep & (sums - kept < top_p[:, None] * sums[:, -1:]) & (weights >= min_p[:, None])
    return keep | (order == 0)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores of each row and their indices, descending, the lower index first among equals.

    scores: [rows, columns] float32; where columns are fewer than `count`, all of them. The largest scores lie in the
    chunks with the largest maxima, so that two small searches do what one over all columns would.
    """
    columns = scores.shape[-1]
    chunks = -(-columns // CHUNK)
    if chunks <= count:
        return _first(scores, torch.arange(columns, device=scores.device).expand_as(scores), count)
    if columns % CHUNK:
        scores = torch.nn.functional.pad(scores, (0, chunks * CHUNK - columns), value=-torch.inf)
    maxima = scores.unflatten(-1, (chunks, CHUNK)).amax(-1)
    _, chosen = _first(maxima, torch.arange(chunks, device=scores.device).expand_as(maxima), count)
    within = torch.arange(CHUNK, device=scores.device)
    ids = (chosen[..., None] * CHUNK + within).flatten(1)
    return _first(scores.gather(1, ids), ids, count)


def _first(scores: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores and their ids. Score and id make one key, so that no two are equal and the order is total."""
    bits = scores.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # compares as integer like the float does
    keys = (ordered.long() << 32) | (0xFFFFFFFF - ids)
    chosen = keys.topk(min(count, keys.shape[-1])).indices
    return scores.gather(1, chosen), ids.gather(1, chosen)


def nucleus_threshold(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The largest t of each row for which its entries ≥ t hold at least top_p of the total, by bisection.

    probabilities: [rows, columns]; top_p and result: [rows].
    """
    wanted = top_p * probabilities.sum(-1)
    high = probabilities.amax(-1)
    low = torch.zeros_like(high)
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        enough = _mass_from(probabilities, middle) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(_mass_from(probabilities, high) >= wanted, high, low)


def _mass_from(probabilities: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(probabilities >= threshold[:, None], probabilities, 0.0).sum(-1)


def exponential_noise(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Independent Exp(1) numbers, float32 > 0, a pure function of (seed, position, token id).

    seeds, positions: int64 [rows]; ids: int64 [rows or 1, columns]. Returns [rows, columns].
    """
    bits = mix64(ids ^ mix64(positions ^ mix64(seeds))[:, None])
    uniform = ((bits & 0x7FFFFF).float() + 0.5) * 2**-23  # 24 bits would round up to 1, and its logarithm to 0
    return -torch.log(uniform)


def mix64(value: Tensor) -> Tensor:
    """The SplitMix64 output function on int64 tensors, arithmetic modulo 2^64. Source: Steele, Lea, Flood 2014."""
    value = value + -0x61C8864680B583EB
    value = (value ^ _shift_right(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift_right(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, count: int) -> Tensor:
    """Logical shift: torch's own repeats the sign bit."""
    return (value >> count) & ((1 << (64 - count)) - 1)
