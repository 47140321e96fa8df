"""Axes and scales of charts: from values to coordinates, and which values to mark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A label with its unit; `log` for a logarithmic scale, `whole` for whole numbers only, `zero` to begin at zero.

    A linear axis spans at least `span`, or 5 % of the largest value, and a logarithmic one a factor of 1.5, so that
    small differences do not fill the chart.
    """

    name: str
    log: bool = False
    whole: bool = False
    zero: bool = False
    span: float = 0.0

    @property
    def label(self) -> str:
        """The name with what a reader must know about the scale."""
        return f"{self.name} (log scale)" if self.log else self.name


@dataclass(frozen=True)
class Scale:
    """A map from values in [low, high] to coordinates in [start, stop], with the values to mark."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: Sequence[float]

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (v - a) / (b - a) * (self.stop - self.start)


def scale(values: Sequence[float], axis: Axis, start: float, stop: float, *, whole_steps: bool = True) -> Scale:
    """The scale of an axis over `values`; with `whole_steps`, a linear axis of fractional numbers ends at ticks."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if axis.log:
        wider = math.sqrt(max(1.5 * low / high, 1.0))
        low, high = low / wider, high * wider
        return Scale(low, high, start, stop, True, _log_ticks(low, high))
    low = 0.0 if axis.zero else low
    least = axis.span or 0.05 * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = (0.0, least) if axis.zero else ((low + high - least) / 2, (low + high + least) / 2)
    step = _step((high - low) / 5, axis.whole)
    if whole_steps and not axis.whole:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Scale(low, high, start, stop, False, _ticks(low, high, step))


def _step(rough: float, whole: bool) -> float:
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    return max(1.0, round(step)) if whole else step


def _ticks(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-6)
    return [(first + i) * step for i in range(math.floor(high / step + 1e-6) - first + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """As many multiples of powers of ten as have room, or even steps on a shorter axis."""
    for parts in ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        if len(ticks := multiples(low, high, parts)) <= 7:
            break
    ticks = ticks[:: math.ceil(len(ticks) / 7)]
    return ticks if len(ticks) >= 3 else _ticks(low, high, _step((high - low) / 6, False))


def multiples(low: float, high: float, parts: Sequence[float]) -> list[float]:
    """The multiples of powers of ten between `low` and `high`, up to rounding."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**d for d in decades for m in parts if low <= m * 10.0**d * 1.0001 <= high * 1.0002]


def drawable(value: float, log: bool) -> bool:
    """Whether a value has a place on an axis."""
    return math.isfinite(value) and (value > 0 or not log)


def number(value: float) -> str:
    """A number with four significant digits and no trailing zeros."""
    text = f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e")
