"""Speculative decoding by prompt lookup: guesses without a second model, and the decision when they are worth a try.

Answers about a text often repeat it. The guess is what followed the latest earlier occurrence of the last few tokens; the
engine decodes it as further rows of the same step and keeps what it would have drawn itself. Exact by construction: the
draw at a position depends on seed and position alone, so a guess is kept only if it is the very token that was due.
Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence

MATCHED = (4, 3, 2)  # tokens that must have occurred before, the most telling first
MEMORY = 0.75  # weight of the past in the acceptance rate
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # tokens decoded plainly after guesses that did not pay


class PromptLookup:
    """Guesses for one request. tokens: its prompt and what was drawn since; most: the longest guess."""

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._most = most
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # last tokens → where what followed them begins
        self._rate = 1.0
        self._length = most
        self._pause = FIRST_PAUSE
        self._wait = 0
        for token in tokens:
            self._append(token)

    def guess(self, row_cost: float, rows: int) -> list[int]:
        """What may come next, nothing if it would not pay. rows: requests in this step; row_cost: see `pays`."""
        if self._wait or not pays(1.0, row_cost, rows):
            return []
        for count in MATCHED:
            begin = self._followed.get(tuple(self._tokens[-count:]))
            if begin is not None:
                return self._tokens[begin : begin + self._length]
        return []

    def learn(self, guessed: int, drawn: Sequence[int], row_cost: float, rows: int) -> None:
        """Take in one step's result: `drawn` are the tokens kept, of which all but the last were guessed right."""
        for token in drawn:
            self._append(token)
        self._wait = max(0, self._wait - len(drawn))
        if not guessed:
            return
        right = len(drawn) - 1
        self._rate = MEMORY * self._rate + (1 - MEMORY) * right / guessed
        self._length = min(self._most, 2 * guessed) if right == guessed else max(1, right + 1)
        if pays(self._rate, row_cost, rows):
            self._pause = FIRST_PAUSE
        else:
            self._wait, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)

    def _append(self, token: int) -> None:
        for count in MATCHED:
            if len(self._tokens) >= count:
                self._followed[tuple(self._tokens[-count:])] = len(self._tokens)
        self._tokens.append(token)


def pays(rate: float, row_cost: float, rows: int) -> bool:
    """Whether guesses that come true with probability `rate` save time.

    row_cost: what one more row adds to a step, as a share of a step with one row. A step of n rows takes 1 + (n − 1) ·
    row_cost, so a token costs the n-th part of that; a guess costs one row and saves `rate` tokens.
    """
    return rate * (1 + (rows - 1) * row_cost) / rows > row_cost
