"""What was found out about each recipe, who dominates whom, and what to recommend. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from gemma_opt.evaluation.suite import Evaluation

SAME_SPEED = 0.03  # decode rates closer than this are called equal: repeated runs differ by about as much, or by their spread
QUALITY_BUDGETS = (0.005, 0.02, 0.05, 0.20)  # perplexity above the base's, as a share
SIZE_BUDGETS = (0.75, 0.60, 0.40)  # bytes as a share of the base's in bfloat16


@dataclass(frozen=True)
class Speed:
    """Decode rate at batch 1. ratio: to the base's, the median of the rounds; low and high: its extremes over the rounds."""

    tokens_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Candidate:
    """One recipe, measured. bytes: of the weight files (of the base: in bfloat16). sparsity: zeros in text linears."""

    name: str
    description: str
    bytes: int
    sparsity: float
    speed: Speed
    evaluation: Evaluation
    is_base: bool = False

    @property
    def loss(self) -> float:
        """What quality costs: mean perplexity ratio to the base over all texts (geometric), minus 1."""
        ratios = [agreement.ratio for agreement in self.evaluation.agreement.values()]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) - 1 if ratios else 0.0

    @property
    def kl(self) -> float:
        """Mean KL divergence from the base over all texts, nats a token."""
        found = [agreement.kl for agreement in self.evaluation.agreement.values()]
        return sum(found) / len(found) if found else 0.0

    @property
    def top1(self) -> float:
        """Mean top-1 agreement with the base over all texts."""
        found = [agreement.top1 for agreement in self.evaluation.agreement.values()]
        return sum(found) / len(found) if found else 1.0

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return {
            "name": self.name,
            "description": self.description,
            "is_base": self.is_base,
            "bytes": self.bytes,
            "sparsity": self.sparsity,
            "perplexity_loss": self.loss,
            "speed": asdict(self.speed),
            **self.evaluation.to_json(),
        }


def faster(one: Candidate, other: Candidate) -> bool:
    """Whether `one` decodes faster than noise explains: by more than SAME_SPEED, each outside the other's rounds."""
    ours, theirs = one.speed, other.speed
    return ours.ratio > theirs.ratio * (1 + SAME_SPEED) and ours.ratio > theirs.ratio_high and theirs.ratio < ours.ratio_low


def dominates(one: Candidate, other: Candidate, *, by: str) -> bool:
    """Whether `one` is no worse in quality and in `by` ("size" or "speed"), and better in one of them.

    A lead in speed that noise explains is none.
    """
    if by == "size":
        gain, no_worse = one.bytes < other.bytes, one.bytes <= other.bytes
    else:
        gain, no_worse = faster(one, other), not faster(other, one)
    return no_worse and one.loss <= other.loss and (gain or one.loss < other.loss)


def frontier(candidates: Sequence[Candidate], *, by: str) -> list[Candidate]:
    """The Pareto set: those that no other dominates, best quality first."""
    kept = [one for one in candidates if not any(dominates(other, one, by=by) for other in candidates)]
    return sorted(kept, key=lambda one: one.loss)


@dataclass(frozen=True)
class Recommendation:
    """The answer for one budget. recipe: None where nothing measured keeps it."""

    budget: str
    goal: str
    recipe: str | None
    why: str

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return asdict(self)


def recommend(candidates: Sequence[Candidate]) -> list[Recommendation]:
    """For every quality budget the smallest and the fastest recipe, for every size budget the best one."""
    base = next(one for one in candidates if one.is_base)
    found: list[Recommendation] = []
    for budget in QUALITY_BUDGETS:
        fitting = [one for one in candidates if one.loss <= budget]
        words = f"perplexity at most +{budget:.1%}"
        found.append(_answer(words, "smallest", min(fitting, key=lambda one: (one.bytes, one.loss), default=None), base))
        found.append(_fastest(fitting, base, words))
    for budget in SIZE_BUDGETS:
        fitting = [one for one in candidates if one.bytes <= budget * base.bytes]
        best = min(fitting, key=lambda one: (one.loss, one.bytes), default=None)
        found.append(_answer(f"at most {budget:.0%} of the base's bytes", "best quality", best, base))
    return found


def _fastest(fitting: Sequence[Candidate], base: Candidate, budget: str) -> Recommendation:
    """The best quality, then the smallest, among those that the fastest leads by no more than noise; and whom it ties with."""
    top = max(fitting, key=lambda one: one.speed.ratio, default=None)
    if top is None:
        return _answer(budget, "fastest", None, base)
    tied = [one for one in fitting if not faster(top, one)]
    chosen = min(tied, key=lambda one: (one.loss, one.bytes))
    found = _answer(budget, "fastest", chosen, base)
    if chosen is top:
        return found
    better = "of better quality" if chosen.loss < top.loss else "smaller"
    lead = f"{better}, and as fast as {top.name} ({top.speed.ratio:.2f} ×) within the rounds' spread"
    return replace(found, why=f"{found.why}; {lead}")


def _answer(budget: str, goal: str, chosen: Candidate | None, base: Candidate) -> Recommendation:
    if chosen is None:
        return Recommendation(budget, goal, None, "no measured recipe keeps this budget")
    loss = round(chosen.loss, 3) + 0.0  # no minus before zero
    why = f"{chosen.bytes / base.bytes:.0%} of the bytes, {chosen.speed.ratio:.2f} × the speed, perplexity {loss:+.1%}"
    return Recommendation(budget, goal, chosen.name, why)
