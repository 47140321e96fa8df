"""Meeting a sparsity budget exactly: clip, restore the parameter-weighted mean, round to whole weights.

The published formulas can leave [0, 1] or miss the target when blocks differ in size; these three functions repair that without
changing anything where the formula was already legal (which the golden layer sparsities check).
"""

import math
from collections.abc import Callable, Sequence

Numbers = Sequence[float]


def mean(values: Numbers, n: Sequence[int]) -> float:
    """Parameter-weighted mean of `values`."""
    return math.fsum(v * k for v, k in zip(values, n, strict=True)) / sum(n)


def scale_to(raw: Numbers, n: Sequence[int], target: float) -> list[float]:
    """Return min(1, c * raw) with c such that the weighted mean is `target`; raw values are >= 0 and not all zero.

    Without clipping this is the normalization of AlphaPruning, s_l = r_l * S * sum(n) / sum(n * r).
    """
    factor = target / mean(raw, n)
    if factor * max(raw) <= 1:
        return [factor * r for r in raw]
    if mean([1.0 if r > 0 else 0.0 for r in raw], n) <= target:  # even full removal of every positive layer is not enough
        raw = [max(r, 1e-9 * max(raw)) for r in raw]
    return _solve(lambda c: [min(1.0, c * r) for r in raw], n, target, 0.0, 1.0 / min(r for r in raw if r > 0))


def shift_to(raw: Numbers, n: Sequence[int], target: float) -> list[float]:
    """Return clip(raw + c, 0, 1) with c such that the weighted mean is `target`.

    The additive repair keeps the differences between layers, as ATP's progression and OWL's window ask.
    """
    shift = target - mean(raw, n)
    if abs(shift) < 1e-12:  # a published value must keep its last bit: counts are rounded down from it
        shift = 0.0
    if min(raw) + shift >= 0 and max(raw) + shift <= 1:
        return [r + shift for r in raw]
    return _solve(lambda c: [min(1.0, max(0.0, r + c)) for r in raw], n, target, -max(raw), 1 - min(raw))


def _solve(values: Callable[[float], list[float]], n: Sequence[int], target: float, low: float, high: float) -> list[float]:
    """Bisect the monotone map c -> values(c) until its weighted mean is `target` to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if mean(values(middle), n) < target else (low, middle)
    return values(high)


def whole_numbers(exact: Numbers, ceilings: Sequence[int], units: Sequence[float] | None = None) -> list[int]:
    """Round `exact` to whole numbers, keeping the total (largest remainder first; earlier entries win ties).

    `units` is what one step of each entry weighs in the total (default 1 each: the result then sums to round(sum(exact))).
    No entry exceeds its ceiling.
    """
    units = units or [1.0] * len(exact)
    whole = [min(math.floor(x + 1e-9), top) for x, top in zip(exact, ceilings, strict=True)]
    missing = math.fsum(u * (x - k) for u, x, k in zip(units, exact, whole, strict=True))
    for i in sorted(range(len(whole)), key=lambda i: (whole[i] - exact[i], i)):
        if missing >= units[i] / 2 and whole[i] < ceilings[i]:
            whole[i] += 1
            missing -= units[i]
    return whole
