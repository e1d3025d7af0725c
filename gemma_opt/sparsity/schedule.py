"""How the ratio of gradual pruning grows."""

from collections.abc import Callable

from gemma_opt.recipe import Schedule

_GROWTH: dict[str, Callable[[float], float]] = {"linear": lambda part: part, "cubic": lambda part: 1 - (1 - part) ** 3}


def ratio_after(step: int, ratio: float, schedule: Schedule) -> float:
    """The ratio asked of a layer after step 1..steps; the last step asks exactly `ratio`.

    linear: ratio · s/S. cubic: ratio · (1 − (1 − s/S)³), fast at first, while much is still redundant.
    Source: Zhu and Gupta 2017, arXiv:1710.01878.
    """
    return ratio * _GROWTH[schedule.kind](step / schedule.steps)
