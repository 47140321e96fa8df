"""The common threshold of all layers' scores that meets the budget, from the quantiles of the scores."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from billhook.plan.budget import mean

Curve = Sequence[float]


def cut(curves: Sequence[Curve], n: Sequence[int], target: float, ceiling: float) -> list[float]:
    """The fraction of each layer below the common threshold, at most `ceiling`, with weighted mean `target` <= ceiling.

    `curves` are ascending quantiles of each layer's scores at equal steps, interpolated linearly. If the threshold is
    a score that occurs many times, every layer loses the same part of its occurrences.
    """
    knots = sorted({value for curve in curves for value in curve})

    def shares(step: int) -> list[float]:
        """Even steps: the shares strictly below a knot; odd steps: at or below it."""
        return [min(ceiling, _share(curve, knots[step // 2], step % 2 == 1)) for curve in curves]

    low, high = 0, 2 * len(knots) - 1  # nothing lies below the first knot, everything at or below the last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean(shares(middle), n) < target else (low, middle)
    before, after = shares(low), shares(high)
    from_, to = mean(before, n), mean(after, n)
    part = min(1.0, max(0.0, (target - from_) / (to - from_))) if to > from_ else 0.0
    return [b + part * (a - b) for b, a in zip(before, after, strict=True)]


def _share(curve: Curve, value: float, inclusive: bool) -> float:
    """The share of scores below `value` (or equal to it, if `inclusive`)."""
    steps = len(curve) - 1
    left, right = bisect_left(curve, value), bisect_right(curve, value)
    if right > left:  # `value` is itself a quantile, perhaps repeated
        return (right - 1 if inclusive else left) / steps
    if left == 0:
        return 0.0
    if left > steps:
        return 1.0
    below, above = curve[left - 1], curve[left]
    # halves, because the difference of two floats can overflow
    inside = (value / 2 - below / 2) / (above / 2 - below / 2)
    return (left - 1 + (inside if math.isfinite(inside) else 0.5)) / steps
