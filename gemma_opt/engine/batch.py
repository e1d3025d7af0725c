"""What a decode step needs to know of every slot, as tensors by slot, and the step itself: decode, sample, feed back.

`step` has static shapes, reads no value on the host and branches on none, so that one CUDA graph per number of rows and
`Level` can hold it. On the CPU `step_apart` makes the same tokens, and each row pays only for what it asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from gemma_opt.engine.interface import SamplingParams
from gemma_opt.engine.sampling import (
    Route,
    SamplingRows,
    next_tokens,
    next_tokens_apart,
    penalize_repetition,
    route_of,
)

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens, slots, positions), each int64 [rows] → float32 logits [rows, vocabulary]; may be overwritten by the sampler."""

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [rows, vocabulary], slots, positions) → the tokens after `positions`, int64 [rows], fed back into the batch.

Valid until its next call. Of two rows with one slot both do the same. `Batch.advance` is one of each level.
"""


class Level(IntEnum):
    """How much of the sampler a captured step holds. Each level's tokens are those of the levels below."""

    GREEDY = 0
    NARROW = 1  # and top-k up to `sampling.NARROW`: the defaults of the service
    ALL = 2  # and everything else, repetition penalty included


LEVEL_ROUTES: dict[Level, tuple[Route, ...]] = {
    Level.GREEDY: (Route.GREEDY,),
    Level.NARROW: (Route.GREEDY, Route.NARROW),
    Level.ALL: tuple(Route),
}


def level_of(samplings: Collection[SamplingParams]) -> Level:
    """The lowest level that serves all of these requests."""
    routes = {route_of(sampling) for sampling in samplings}
    if any(sampling.repetition_penalty != 1 for sampling in samplings):
        return Level.ALL
    return next(level for level, held in LEVEL_ROUTES.items() if routes <= set(held))


class Batch:
    """The state of all slots. Every tensor is [slots] but `seen`, bool [slots, vocabulary], and `stop_ids`."""

    def __init__(self, slots: int, vocabulary: int, stop_ids: Collection[int], device: torch.device) -> None:
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)  # the last of each slot, not yet in its cache
        self.positions = torch.zeros(slots, dtype=torch.int64, device=device)  # and its place in the sequence
        self.stops_from = torch.zeros(slots, dtype=torch.int64, device=device)  # first position that may hold a stop token
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self.rows = SamplingRows.empty(slots, device)
        self._yes = torch.ones((), dtype=torch.bool, device=device)  # a Python True would be copied to the GPU in every step
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)  # [stop ids]
        self._samplings = [SamplingParams(temperature=0)] * slots

    def start(self, slot: int, sampling: SamplingParams, token_ids: Sequence[int]) -> None:
        """Take a new request's parameters and prompt into its slot."""
        self._samplings[slot] = sampling
        self.rows.set_(slot, sampling)
        self.stops_from[slot] = len(token_ids) + sampling.min_new_tokens
        self.seen[slot] = False
        self.seen[slot, torch.tensor(token_ids, device=self.seen.device)] = True

    def feed(self, slots: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """Make `tokens` the last ones of their slots, at `positions`. All [rows]."""
        self.tokens[slots] = tokens
        self.positions[slots] = positions
        self.seen[slots, tokens] = self._yes

    def level(self, slots: Sequence[int]) -> Level:
        """The lowest level that serves the requests in these slots."""
        return level_of([self._samplings[slot] for slot in slots])

    def draw(self, logits: Tensor, slots: Tensor, positions: Tensor, level: Level) -> Tensor:
        """The tokens that follow: int64 [rows], for the sequence index `positions` of each row's slot.

        logits: float32 [rows, vocabulary], overwritten. level: at least `self.level` of the slots.
        """
        self._hold_stops_back_(logits, slots, positions)
        rows = self.rows.take(slots)
        if level is Level.ALL:
            logits = penalize_repetition(logits, self.seen[slots], rows.penalty)
        return next_tokens(logits, rows, positions, LEVEL_ROUTES[level])

    def advance(self, logits: Tensor, slots: Tensor, positions: Tensor, level: Level) -> Tensor:
        """`draw` the tokens that follow those at `positions`, and `feed` them: int64 [rows]."""
        tokens = self.draw(logits, slots, positions + 1, level)
        self.feed(slots, tokens, positions + 1)
        return tokens

    def draw_apart(self, logits: Tensor, slots: Sequence[int], positions: Tensor) -> Tensor:
        """The same tokens, each row paying for what its own request asked for."""
        samplings = [self._samplings[slot] for slot in slots]
        index = torch.tensor(slots, device=logits.device)
        if any(sampling.min_new_tokens for sampling in samplings):
            self._hold_stops_back_(logits, index, positions)
        for row, (slot, sampling) in enumerate(zip(slots, samplings, strict=True)):
            if sampling.repetition_penalty != 1:
                seen = self.seen[slot].nonzero()[:, 0]  # some hundreds of a vocabulary of 262,144
                scores, penalty = logits[row : row + 1, seen], self.rows.penalty[slot : slot + 1]
                logits[row, seen] = penalize_repetition(scores, torch.ones_like(scores, dtype=torch.bool), penalty)[0]
        return next_tokens_apart(logits, self.rows.take(index), positions, [route_of(sampling) for sampling in samplings])

    def _hold_stops_back_(self, logits: Tensor, slots: Tensor, positions: Tensor) -> None:
        """No stop token before min_new_tokens."""
        held = (positions < self.stops_from[slots])[:, None]
        logits[:, self.stop_ids] = logits[:, self.stop_ids].masked_fill(held, -torch.inf)


def step(decode: Decode, batch: Batch, slots: Tensor, sampler: Sampler) -> Tensor:
    """One decode step of `slots` (int64 [rows]): their next tokens, int64 [rows], which are also fed back into `batch`.

    sampler: of `batch` and of at least its level of these slots.

    A slot may occur twice (rows that fill a captured step up): both rows then do the same and write the same.
    """
    positions = batch.positions[slots]
    return sampler(decode(batch.tokens[slots], slots, positions), slots, positions)


def step_apart(decode: Decode, batch: Batch, slots: Sequence[int]) -> Tensor:
    """The same step where rows need not share one shape: on the CPU."""
    index = torch.tensor(slots, device=batch.tokens.device)
    positions = batch.positions[index]
    logits = decode(batch.tokens[index], index, positions)
    tokens = batch.draw_apart(logits, slots, positions + 1)
    batch.feed(index, tokens, positions + 1)
    return tokens
