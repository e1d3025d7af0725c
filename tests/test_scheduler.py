"""The scheduler under everything that can happen to it: requests come, finish and are cancelled in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from gemma_opt.engine.scheduler import Scheduler, chunk_ends


def first_free(_key: int, free: Sequence[int]) -> tuple[int, int]:
    return min(free), 0


def random_prompt(rng: random.Random) -> tuple[int, list[tuple[int, int]]]:
    """Length and pictures of a prompt: some of them longer than a chunk, some side by side."""
    spans, position = [], rng.randrange(3)
    for _ in range(rng.randrange(4)):
        size = rng.choice((1, 4, 16, 30))
        spans.append((position, position + size))
        position += size + rng.choice((1, 1, 2, 25))
    return position + 1 + rng.randrange(40), spans


# Where prompts are cut


@pytest.mark.parametrize(
    ("length", "spans", "ends"),
    [
        (5, [], (5,)),
        (16, [], (16,)),
        (40, [], (16, 32, 40)),
        (20, [(4, 8)], (8, 20)),  # a picture ends a chunk
        (40, [(10, 20)], (10, 20, 36, 40)),  # never cut: the chunk stops in front of it
        (60, [(10, 40)], (10, 40, 56, 60)),  # longer than a chunk: a chunk of its own
        (40, [(0, 16), (17, 33)], (16, 17, 33, 40)),
        (34, [(10, 33)], (10, 33, 34)),
    ],
)
def test_cuts_done_by_hand(length: int, spans: list[tuple[int, int]], ends: tuple[int, ...]) -> None:
    assert chunk_ends(length, spans, 16) == ends


@pytest.mark.parametrize("seed", range(200))
def test_no_cut_tears_a_picture_and_a_beginning_is_cut_the_same_in_every_prompt(seed: int) -> None:
    rng = random.Random(seed)
    length, spans = random_prompt(rng)
    ends = chunk_ends(length, spans, 16)
    assert list(ends) == sorted(set(ends))
    assert ends[-1] == length
    assert not [(begin, stop) for begin, stop in spans for end in ends if begin < end < stop]
    longest = max((stop - begin for begin, stop in spans), default=0)
    assert max(end - start for start, end in zip((0, *ends), ends, strict=False)) <= max(16, longest)
    longer = chunk_ends(length + rng.randrange(1, 50), spans, 16)
    assert longer[: len(ends) - 1] == ends[:-1]


# Turns


def run(seed: int, slots: int, requests: int) -> None:
    """A model of an engine that counts: every promise of the scheduler is checked after every turn."""
    rng = random.Random(seed)
    scheduler: Scheduler[int] = Scheduler(slots)
    ends: dict[int, tuple[int, ...]] = {}
    read: dict[int, int] = {}  # positions read of each request's prompt
    held: dict[int, int] = {}  # key → slot
    left: dict[int, int] = {}  # tokens to decode
    admitted: list[int] = []
    arrived: list[int] = []
    cancelled_waiting: set[int] = set()

    def forget(key: int) -> None:
        slot = scheduler.remove(key)
        assert slot == held.pop(key, None)
        if slot is None:
            cancelled_waiting.add(key)
        for table in (ends, read, left):
            table.pop(key, None)

    turns = 0
    while len(arrived) < requests or not scheduler.idle:
        turns += 1
        assert turns < 100_000, "somebody starves"
        while len(arrived) < requests and rng.random() < 0.4:
            key = len(arrived)
            length, spans = random_prompt(rng)
            ends[key], left[key] = chunk_ends(length, spans, 16), rng.randrange(1, 12)
            scheduler.add(key, ends[key])
            arrived.append(key)
        for admission in scheduler.admit(first_free):
            assert admission.slot not in held.values(), "two requests in one slot"
            held[admission.key], read[admission.key] = admission.slot, admission.reused
            admitted.append(admission.key)
        assert len(held) == slots or set(ends) <= set(held), "a slot is free while somebody waits"
        if chunk := scheduler.next_chunk():
            assert (chunk.slot, chunk.start) == (held[chunk.key], read[chunk.key])
            assert chunk.end in ends[chunk.key]
            assert chunk.last == (chunk.end == ends[chunk.key][-1])
            read[chunk.key] = chunk.end
        decoding = scheduler.decoding
        assert decoding == {key: held[key] for key in held if read[key] == ends[key][-1]}
        assert list(decoding.values()) == sorted(decoding.values())
        for key in decoding:
            left[key] -= 1
            if left[key] == 0:
                forget(key)
        if ends and rng.random() < 0.1:
            forget(rng.choice(list(ends)))
    assert admitted == [key for key in arrived if key not in cancelled_waiting], "not in order of arrival"
    assert not held


@pytest.mark.parametrize("seed", range(60))
def test_every_promise_holds_whatever_happens(seed: int) -> None:
    run(seed, slots=1 + seed % 5, requests=40)


def test_prompts_are_read_in_rotation_so_that_a_short_one_is_not_behind_a_long_one() -> None:
    scheduler: Scheduler[str] = Scheduler(2)
    scheduler.add("long", chunk_ends(160, [], 16))
    scheduler.add("short", chunk_ends(20, [], 16))
    scheduler.admit(lambda _key, free: (min(free), 0))
    order = [chunk.key for _ in range(5) if (chunk := scheduler.next_chunk())]
    assert order == ["long", "short", "long", "short", "long"]
    assert scheduler.decoding == {"short": 1}


def test_a_reused_beginning_is_not_read_again() -> None:
    scheduler: Scheduler[str] = Scheduler(2)
    scheduler.add("again", chunk_ends(40, [], 16))
    assert scheduler.admit(lambda _key, _free: (1, 32))[0].reused == 32
    chunk = scheduler.next_chunk()
    assert chunk is not None
    assert (chunk.slot, chunk.start, chunk.end, chunk.last) == (1, 32, 40, True)


def test_a_cancel_frees_the_slot_at_once_and_the_next_in_line_gets_it() -> None:
    scheduler: Scheduler[int] = Scheduler(1)
    for key in range(3):
        scheduler.add(key, (8,))
    scheduler.admit(first_free)
    assert scheduler.remove(0) == 0
    assert scheduler.remove(1) is None
    assert [admission.key for admission in scheduler.admit(first_free)] == [2]
    assert scheduler.remove("nobody") is None  # type: ignore[arg-type]
