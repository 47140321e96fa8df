"""Meeting a sparsity budget exactly: clip, restore the parameter-weighted mean, round to whole weights.

The published formulas can leave [0, 1] or miss the target when blocks differ in size; these functions repair that and
change nothing where the formula gave a legal result.
"""

import math
from collections.abc import Callable, Sequence

Numbers = Sequence[float]


def mean(values: Numbers, n: Sequence[int]) -> float:
    """Parameter-weighted mean of `values`."""
    return math.fsum(v * k for v, k in zip(values, n, strict=True)) / sum(n)


def min_max(values: Numbers) -> list[float]:
    """Map linearly from [min, max] to [0, 1]; values that are equal up to rounding all become 0.5."""
    low, high = min(values), max(values)
    equal = high - low <= 1e-14 * max(abs(low), abs(high))
    return [0.5 if equal else (v - low) / (high - low) for v in values]


def scale_to(raw: Numbers, n: Sequence[int], target: float) -> list[float]:
    """Return min(1, c * raw) with c such that the weighted mean is `target`; raw values are >= 0 and not all zero.

    Without clipping this is the normalization of AlphaPruning, s_l = r_l * S * sum(n) / sum(n * r).
    """
    factor = target / mean(raw, n)
    if factor * max(raw) <= 1:
        return [factor * r for r in raw]
    if mean([float(r > 0) for r in raw], n) <= target:  # removing all layers with r > 0 would not be enough
        raw = [max(r, 1e-9 * max(raw)) for r in raw]
    return _solve(lambda c: [min(1.0, c * r) for r in raw], n, target, 0.0, 1.0 / min(r for r in raw if r > 0))


def shift_to(raw: Numbers, n: Sequence[int], target: float) -> list[float]:
    """Return clip(raw + c, 0, 1) with c such that the weighted mean is `target`.

    The differences between layers are kept, as ATP's progression and OWL's window require.
    """
    if target == 0:  # exactly, without rounding errors
        return [0.0] * len(raw)
    shift = target - mean(raw, n)
    if abs(shift) < 1e-12:  # published values stay exact, because counts are rounded down from them
        shift = 0.0
    if min(raw) + shift >= 0 and max(raw) + shift <= 1:
        return [r + shift for r in raw]
    return _solve(lambda c: [min(1.0, max(0.0, r + c)) for r in raw], n, target, -max(raw), 1 - min(raw))


def _solve(
    values: Callable[[float], list[float]], n: Sequence[int], target: float, low: float, high: float
) -> list[float]:
    """Bisect the monotone map c -> values(c) until its weighted mean is `target` to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if mean(values(middle), n) < target else (low, middle)
    return values(high)


def whole_numbers(exact: Numbers, ceilings: Sequence[int], units: Sequence[float] | None = None) -> list[int]:
    """Round `exact` to whole numbers with the same total (largest remainder first; earlier entries win ties).

    `units` are the weights of the entries in the total (default 1: the result then sums to sum(exact), a half rounded
    up). No entry exceeds its ceiling.
    """
    units = units or [1.0] * len(exact)
    low = [min(math.floor(x + 1e-9), top) for x, top in zip(exact, ceilings, strict=True)]
    high = [max(k, min(math.ceil(x - 1e-9), top)) for k, x, top in zip(low, exact, ceilings, strict=True)]
    whole = list(low)
    missing = math.fsum(u * (x - k) for u, x, k in zip(units, exact, whole, strict=True))
    order = sorted(range(len(whole)), key=lambda i: (whole[i] - exact[i], i))
    for i in order:
        if missing >= units[i] / 2 and whole[i] < high[i]:
            whole[i] += 1
            missing -= units[i]
    return _nearer(whole, low, high, units, missing, order)


def _nearer(
    whole: list[int], low: Sequence[int], high: Sequence[int], units: Numbers, missing: float, order: Sequence[int]
) -> list[int]:
    """Round entries the other way while that brings the total nearer: steps of different weights can overshoot it."""
    changed = True
    while changed:
        changed = False
        step, ends, turn = (1, high, order) if missing > 0 else (-1, low, order[::-1])
        for i in turn:
            if whole[i] != ends[i] and units[i] * (1 + 1e-9) < 2 * step * missing:
                whole[i] += step
                missing -= step * units[i]
                changed = True
    return whole
