"""One ratio for the model, shared out over its layers: by the size of their weights (method `layer_norm`), or by what
their weights are measured to do to the loss (allocation `sensitivity`).

In exact rationals: the counts must add up to the weight, and float sums over three billion weights would not.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor

from gemma_opt.policy import dropped_count

MAX_SHARE = Fraction(19, 20)  # no layer loses more: an emptied layer cuts the network
TRUST = Fraction(1, 2)  # in the measured sensitivities


def layer_norm_counts(rms: Sequence[float], sizes: Sequence[int], ratio: float) -> list[int]:
    """How many weights each layer drops; the sum is exactly `dropped_count(sum(sizes), ratio)`.

    rms: ‖W_i‖_F / √n_i; sizes: n_i. The shares of `layer_norm_shares`, made whole by largest remainder (of equal
    remainders the earlier layer is rounded up).
    """
    return _whole(layer_norm_shares(rms, sizes, ratio), sizes, dropped_count(sum(sizes), ratio))


def sensitivity_counts(wished: Sequence[int], sizes: Sequence[int], ratio: float) -> list[int]:
    """How many weights each layer drops; the sum is exactly `dropped_count(sum(sizes), ratio)`.

    wished: what one threshold over all weights would drop in each (it sums to that count). The shares lie halfway between
    that wish and `ratio`: the threshold takes errors for small and independent, which at its extremes they are not.
    """
    total = dropped_count(sum(sizes), ratio)
    even = Fraction(total, sum(sizes))
    shares = [(1 - TRUST) * even + TRUST * Fraction(count, size) for count, size in zip(wished, sizes, strict=True)]
    return _whole(shares, sizes, total)


def _whole(shares: Sequence[Fraction], sizes: Sequence[int], total: int) -> list[int]:
    """Whole counts from shares that add up to `total`, by largest remainder."""
    ideal = [share * size for share, size in zip(shares, sizes, strict=True)]
    counts = [floor(value) for value in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda layer: counts[layer] - ideal[layer])
    for layer in by_remainder[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def layer_norm_shares(rms: Sequence[float], sizes: Sequence[int], ratio: float) -> list[Fraction]:
    """The share each layer drops: ratio · mean(rms) / rms_i, at most MAX_SHARE, with Σ share_i · n_i = ratio · Σ n_i.

    Shares above the limit are cut to it, and the others are scaled in proportion to meet the sum; where that lifts another
    one above the limit, it is cut too. Where the cut layers alone exceed the sum they share it evenly and no other layer
    drops anything. A layer of zeros asks for everything, so it is always cut.
    """
    wanted = Fraction(ratio) * sum(sizes)
    mean = sum(map(Fraction, rms), Fraction(0)) / len(rms)
    shares = [Fraction(ratio) * mean / Fraction(value) if value else MAX_SHARE for value in rms]
    while True:
        cut = [share >= MAX_SHARE for share in shares]
        in_cut = sum(size for size, is_cut in zip(sizes, cut, strict=True) if is_cut)
        rest = wanted - MAX_SHARE * in_cut
        if rest <= 0:
            return [wanted / in_cut if is_cut else Fraction(0) for is_cut in cut]
        open_ = sum((share * size for share, size, is_cut in zip(shares, sizes, cut, strict=True) if not is_cut), Fraction(0))
        shares = [MAX_SHARE if is_cut else share * rest / open_ for share, is_cut in zip(shares, cut, strict=True)]
        if [share >= MAX_SHARE for share in shares] == cut:
            return shares
