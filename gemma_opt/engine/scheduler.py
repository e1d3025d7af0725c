"""Who gets a slot and what the next turn computes. Policy only: no tensors, no clock, no threads.

Requests get slots in order of arrival. Each turn reads at most one chunk of one prompt, in rotation over the prompts that
are being read, and decodes one step of every slot whose prompt is read: a long prompt delays nobody by more than a chunk.

Where a prompt is cut depends on the prompt alone (`chunk_ends`), never on what else runs. So the cache holds the same
bits for the same beginning, whoever asks and whenever: a later prompt may take over any beginning that ends at a cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key")
Span = tuple[int, int]  # positions begin ≤ p < end of one picture's soft tokens


def chunk_ends(length: int, image_spans: Sequence[Span], chunk: int) -> tuple[int, ...]:
    """Where a prompt of `length` tokens is cut: ascending, the last is `length`.

    A chunk ends with a picture, so that another question about it can start there, or else after `chunk` tokens; never
    inside a picture, of which tokens see each other both ways. image_spans: ascending.
    """
    ends: list[int] = []
    start, spans = 0, deque(image_spans)
    while start < length:
        end = min(start + chunk, length)
        if spans and spans[0][0] < end:
            begin, stop = spans[0]
            end = stop if stop <= end or begin == start else begin
        if spans and spans[0][1] <= end:
            spans.popleft()
        ends.append(end)
        start = end
    return tuple(ends)


def spans_inside(image_spans: Sequence[Span], start: int, end: int) -> list[Span]:
    """The pictures of a chunk. ValueError if it would tear one."""
    if torn := [span for span in image_spans if span[0] < start < span[1] or span[0] < end < span[1]]:
        raise ValueError(f"a chunk from {start} to {end} tears pictures at {torn}")
    return [span for span in image_spans if start <= span[0] and span[1] <= end]


@dataclass(frozen=True)
class Chunk(Generic[Key]):
    """Read positions start ≤ p < end of `key`'s prompt into its slot. last: then the first token can be drawn."""

    key: Key
    slot: int
    start: int
    end: int
    last: bool


@dataclass(frozen=True)
class Admission(Generic[Key]):
    """`key` got `slot`, of which the first `reused` positions already hold what its prompt begins with."""

    key: Key
    slot: int
    reused: int


@dataclass
class _Prefill(Generic[Key]):
    key: Key
    slot: int
    position: int
    ends: deque[int]


@dataclass(frozen=True)
class _Waiting(Generic[Key]):
    key: Key
    ends: tuple[int, ...]


Place = Callable[[Key, Sequence[int]], tuple[int, int]]
"""Chooses among free slots for a request: (slot, how many positions there can be reused, 0 or one of its chunk ends)."""


class Scheduler(Generic[Key]):
    """Waiting line and slots. Keys are the caller's, unique while they are here."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))
        self._waiting: deque[_Waiting[Key]] = deque()
        self._prefilling: deque[_Prefill[Key]] = deque()
        self._decoding: dict[Key, int] = {}

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not (self._waiting or self._prefilling or self._decoding)

    @property
    def reading(self) -> bool:
        """Some prompt can be read now."""
        return bool(self._prefilling or (self._waiting and self._free))

    @property
    def decoding(self) -> dict[Key, int]:
        """What decodes, with its slot, in order of the slots."""
        return dict(sorted(self._decoding.items(), key=lambda item: item[1]))

    def add(self, key: Key, ends: Sequence[int]) -> None:
        """Put a request at the end of the line. ends: its `chunk_ends`."""
        self._waiting.append(_Waiting(key, tuple(ends)))

    def admit(self, place: Place[Key]) -> list[Admission[Key]]:
        """Give free slots to those who wait longest."""
        admitted: list[Admission[Key]] = []
        while self._free and self._waiting:
            entry = self._waiting.popleft()
            slot, reused = place(entry.key, tuple(self._free))
            self._free.remove(slot)
            left = deque(end for end in entry.ends if end > reused)
            self._prefilling.append(_Prefill(entry.key, slot, reused, left))
            admitted.append(Admission(entry.key, slot, reused))
        return admitted

    def next_chunk(self) -> Chunk[Key] | None:
        """The chunk to read this turn. After its last one a request decodes."""
        if not self._prefilling:
            return None
        entry = self._prefilling.popleft()
        start, entry.position = entry.position, entry.ends.popleft()
        if entry.ends:
            self._prefilling.append(entry)
        else:
            self._decoding[entry.key] = entry.slot
        return Chunk(entry.key, entry.slot, start, entry.position, last=not entry.ends)

    def remove(self, key: Key) -> int | None:
        """Forget a request, wherever it is; its slot, if it had one, is free at once and returned."""
        slot = self._decoding.pop(key, None)
        if slot is None:
            slot = next((entry.slot for entry in self._prefilling if entry.key == key), None)
            self._prefilling = deque(entry for entry in self._prefilling if entry.key != key)
            self._waiting = deque(entry for entry in self._waiting if entry.key != key)
        if slot is not None:
            self._free.append(slot)
        return slot
