"""Prompt lookup: what it guesses, and when it stops guessing."""

from __future__ import annotations

import random

import pytest

from gemma_opt.engine.lookup import LONGEST_PAUSE, PromptLookup, pays

CHEAP = 0.05  # a row of a memory-bound step


def test_the_guess_is_what_followed_the_latest_and_longest_match() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 9, 2, 3, 5, 6, 8, 2, 3], most=3)
    assert lookup.guess(CHEAP, 1) == [5, 6, 8]
    lookup.learn(0, [4], CHEAP, 1)
    assert lookup.guess(CHEAP, 1) == [9, 9, 2]  # "2 3 4" occurred once, at the beginning


def test_nothing_is_guessed_where_nothing_repeats() -> None:
    assert PromptLookup(range(50), most=8).guess(CHEAP, 1) == []
    assert PromptLookup([], most=8).guess(CHEAP, 1) == []


def test_guesses_grow_with_success_and_shrink_to_what_was_right() -> None:
    lookup = PromptLookup([*range(40), 0, 1], most=8)
    assert lookup.guess(CHEAP, 1) == list(range(2, 10))
    lookup.learn(8, [2, 3, 99], CHEAP, 1)  # two were right
    lookup.learn(0, [0, 1], CHEAP, 1)
    assert lookup.guess(CHEAP, 1) == [2, 3, 99]
    lookup.learn(3, [2, 3, 99, 7], CHEAP, 1)
    lookup.learn(0, [20, 21], CHEAP, 1)
    assert lookup.guess(CHEAP, 1) == list(range(22, 28))


def test_wrong_guesses_lead_to_pauses_that_grow() -> None:
    """Random tokens out of four: every pair occurred before, and what followed it then says nothing."""
    rng = random.Random(1)
    lookup, guesses = PromptLookup([rng.randrange(4) for _ in range(100)], most=4), 0
    for _ in range(4 * LONGEST_PAUSE):
        guess, token = lookup.guess(0.5, 1), rng.randrange(4)
        right = bool(guess) and guess[0] == token
        guesses += bool(guess)
        lookup.learn(len(guess), [token, rng.randrange(4)] if right else [token], 0.5, 1)
    assert 3 < guesses < 40


@pytest.mark.parametrize(
    ("rate", "cost", "rows", "expected"),
    [(0.5, 0.0, 1, True), (0.5, 0.4, 1, True), (0.5, 0.6, 1, False), (1.0, 1.0, 1, False), (0.5, 0.1, 4, True),
     (0.9, 0.1, 16, True), (0.2, 0.1, 16, False), (0.1, 0.1, 16, False), (0.5, 0.5, 16, False), (0.0, 0.0, 1, False)],
)  # fmt: skip
def test_when_guesses_pay(rate: float, cost: float, rows: int, expected: bool) -> None:
    assert pays(rate, cost, rows) is expected
