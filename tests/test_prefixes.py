"""Reuse of prompts' beginnings, against a cache that is written down position by position."""

from __future__ import annotations

import random

from gemma_opt.engine.prefixes import Cut, Prefixes, cuts_of
from gemma_opt.engine.scheduler import chunk_ends

RING, WINDOW, CHUNK, SLOTS = 40, 34, 8, 3


class Written:
    """One slot of a ring: which content each place holds. Content: digest of the prompt so far, or a decoded token."""

    def __init__(self) -> None:
        self.places: dict[int, tuple[int, object]] = {}

    def write(self, start: int, end: int, content: object) -> None:
        for position in range(start, end):
            self.places[position % RING] = (position, content)

    def holds(self, cuts: list[Cut], end: int) -> bool:
        """All that positions from `end` on look at, computed from the same prompt."""
        owner = {position: cut.digest for start, cut in spans(cuts) for position in range(start, cut.end)}
        return all(self.places.get(p % RING) == (p, owner[p]) for p in range(max(0, end - WINDOW + 1), end))


def spans(cuts: list[Cut]) -> list[tuple[int, Cut]]:
    return list(zip([0, *(cut.end for cut in cuts)], cuts, strict=False))


def prompt_cuts(rng: random.Random, earlier: list[tuple[int, ...]]) -> list[Cut]:
    """A new prompt, or one that begins like an earlier one."""
    tokens = tuple(rng.randrange(100) for _ in range(rng.randrange(1, 60)))
    if earlier and rng.random() < 0.8:
        beginning = rng.choice(earlier[-6:])
        tokens = beginning[: rng.randrange(len(beginning) // 2, len(beginning) + 1)] + tokens[: rng.randrange(1, 12)]
    earlier.append(tokens)
    return cuts_of(tokens, [], [], chunk_ends(len(tokens), [], CHUNK))


def play(seed: int) -> tuple[int, int]:
    """Let prompts come in random slots and look at all that is reused. How often something was reused, and copied."""
    rng, prefixes, slots = random.Random(seed), Prefixes(SLOTS, RING, WINDOW), [Written() for _ in range(SLOTS)]
    earlier: list[tuple[int, ...]] = []
    reused_ever = copied_ever = 0
    for turn in range(600):
        cuts = prompt_cuts(rng, earlier)
        free = sorted(rng.sample(range(SLOTS), rng.randrange(1, SLOTS + 1)))
        slot, reused = prefixes.choose(free, cuts)
        assert slot in free
        assert reused < cuts[-1].end
        if reused:
            assert slots[slot].holds(cuts, reused)
        prefixes.start(slot, reused)
        reused_ever += reused > 0
        for start, cut in spans(cuts):
            if cut.end <= reused:
                continue
            source = prefixes.holder(cut)
            if source is not None and cut is not cuts[-1]:
                copied_ever += 1
                needed = range(max(start, cut.end - WINDOW + 1), cut.end)
                assert all(slots[source].places[p % RING] == (p, cut.digest) for p in needed)
                slots[slot].write(needed.start, needed.stop, cut.digest)
            else:
                slots[slot].write(start, cut.end, cut.digest)
            prefixes.hold(slot, cut)
        end = cuts[-1].end
        for position in range(end, end + rng.randrange(12)):
            ahead = position + 1 + rng.randrange(RING - WINDOW)  # guesses that are taken back
            slots[slot].write(position, ahead, ("decoded", turn))
            prefixes.wrote(slot, ahead)
    return reused_ever, copied_ever


def test_what_is_reused_is_really_there() -> None:
    reused, copied = zip(*(play(seed) for seed in range(10)), strict=True)
    assert sum(reused) > 100
    assert sum(copied) > 100


def test_a_beginning_is_equal_only_with_the_same_pictures() -> None:
    tokens, span = (5, 7, 7, 7, 6), [(1, 4)]
    one, same, other = (cuts_of(tokens, span, [key], (4, 5)) for key in (b"one", b"one", b"other"))
    assert one == same
    assert {cut.digest for cut in one}.isdisjoint(cut.digest for cut in other)


def test_the_slot_that_holds_most_is_chosen_then_the_one_longest_unused() -> None:
    prefixes = Prefixes(3, RING, WINDOW)
    cuts = cuts_of(range(20), [], [], (8, 16, 20))
    for slot in (2, 0, 1):
        prefixes.start(slot, 0)
    assert prefixes.choose([0, 1, 2], cuts) == (2, 0)
    prefixes.hold(1, cuts[0])
    assert prefixes.choose([0, 1, 2], cuts) == (1, 8)
    assert prefixes.choose([0, 2], cuts) == (2, 0)
    assert prefixes.holder(cuts[0]) == 1
    prefixes.start(1, 0)
    assert prefixes.holder(cuts[0]) is None


def test_past_the_ring_a_beginning_serves_only_where_its_window_is_left() -> None:
    prefixes = Prefixes(1, ring=24, window=20)
    cuts = cuts_of(range(40), [], [], (8, 16, 24, 32, 40))
    for cut in cuts[:4]:
        prefixes.hold(0, cut)
    assert prefixes.choose([0], cuts) == (0, 32)  # 8 to 31 are there, 13 to 31 are looked at
    prefixes.wrote(0, 37)
    assert prefixes.choose([0], cuts) == (0, 32)
    prefixes.wrote(0, 38)
    assert prefixes.choose([0], cuts) == (0, 0)
