"""Which beginnings of prompts the slots' caches still hold, so that they need not be computed again. No tensors.

Prompts are cut by their own content alone (`scheduler.chunk_ends`) and every chunk is computed in one piece, so a chunk
with the same tokens and pictures, after the same chunks, has the same bits in the cache whoever asked for it: taking it
over changes no reply. Only whole chunks of prompts count; what was decoded was computed in other shapes.

Full layers keep all positions of a slot. Sliding layers keep a ring: position p is gone once p + ring was written. A
beginning of n positions can be gone on from if the ring still holds the window in front of position n.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from gemma_opt.engine.scheduler import Span

Digest = bytes


@dataclass(frozen=True)
class Cut:
    """The end of a chunk, and the digest of everything in front of it."""

    end: int
    digest: Digest


def cuts_of(
    token_ids: Sequence[int], image_spans: Sequence[Span], image_keys: Sequence[bytes], ends: Sequence[int]
) -> list[Cut]:
    """The cuts of a prompt. image_keys: a digest of each span's picture. ends: its `chunk_ends`."""
    pictures = dict(zip((begin for begin, _ in image_spans), image_keys, strict=True))
    digest, cuts, start = hashlib.sha256(), [], 0
    for end in ends:
        digest.update(repr(token_ids[start:end]).encode())
        for begin in range(start, end):
            digest.update(pictures.get(begin, b""))
        cuts.append(Cut(end, digest.digest()))
        start = end
    return cuts


@dataclass
class _Held:
    """cuts: ends of whole chunks in the slot's cache; lost: sliding layers have only the positions from here on."""

    cuts: list[Cut] = field(default_factory=list)
    lost: int = 0

    def serves(self, cut: Cut, window: int) -> bool:
        """Whether a prompt can go on after `cut`: everything is there that later positions look at."""
        return cut in self.cuts and (self.lost == 0 or cut.end - window + 1 >= self.lost)


class Prefixes:
    """What each slot holds. ring: positions a sliding layer keeps; window: positions such a layer looks back over."""

    def __init__(self, slots: int, ring: int, window: int) -> None:
        self._ring, self._window = ring, window
        self._held = [_Held() for _ in range(slots)]
        self._used = [0] * slots  # when, in admissions
        self._clock = 0

    def choose(self, free: Sequence[int], cuts: Sequence[Cut]) -> tuple[int, int]:
        """The free slot that holds the longest beginning of a prompt, the longest unused one among equals, and its length.

        The last chunk never counts: the logits after it are wanted.
        """
        found = {slot: self._longest(slot, cuts[:-1]) for slot in free}
        slot = min(free, key=lambda slot: (-found[slot], self._used[slot]))
        return slot, found[slot]

    def start(self, slot: int, reused: int) -> None:
        """A new prompt moves into the slot and keeps the first `reused` positions."""
        self._clock += 1
        self._used[slot] = self._clock
        held = self._held[slot]
        held.cuts = [cut for cut in held.cuts if cut.end <= reused]
        held.lost = held.lost if reused else 0

    def hold(self, slot: int, cut: Cut) -> None:
        """The slot's next chunk was computed or copied up to `cut`."""
        self._held[slot].cuts.append(cut)
        self.wrote(slot, cut.end)

    def wrote(self, slot: int, end: int) -> None:
        """Positions before `end` may have been written, by decoding or by guesses that were taken back."""
        held = self._held[slot]
        held.lost = max(held.lost, end - self._ring)

    def holder(self, cut: Cut) -> int | None:
        """A slot from which the chunk that ends with `cut` can be copied."""
        return next((slot for slot, held in enumerate(self._held) if held.serves(cut, self._window)), None)

    def _longest(self, slot: int, cuts: Sequence[Cut]) -> int:
        return max((cut.end for cut in cuts if self._held[slot].serves(cut, self._window)), default=0)
