"""Types without a minimum: value = (d · multiplier) · code, with a float16 `d` for a block of columns.

A multiplier is a small integer of its own for every group of columns, or 1. `fit` tries some scales for every group and
improves each by least squares; `d` and the multipliers are chosen for the error that a scale causes to second order;
then each multiplier becomes the best of its neighbours, every code being rounded again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Scales, Term
from billhook.methods.quantize.groups import Groups, by_rows, to_half
from billhook.runtime.codes import Sums, search_scale
from billhook.runtime.plain_codes import inverse, nearest_code, quotient

_STARTS = torch.linspace(-1.4, 0.6, 8).tolist()  # see `Symmetric._starts`
_SPLITS = 16  # values of d that are tried before codes are rounded


@dataclass(frozen=True)
class Multipliers:
    """The integers low, low + step, ... high."""

    low: int
    high: int
    step: int = 1

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest multiplier, elementwise."""
        last = (self.high - self.low) // self.step
        return ((x - self.low) / self.step).round().clamp_(0, last) * self.step + self.low

    def neighbours(self, m: Tensor) -> list[Tensor]:
        """Each multiplier, and the ones below and above it."""
        return [(m + move).clamp(self.low, self.high) for move in (0, -self.step, self.step)]


@dataclass(frozen=True)
class Symmetric:
    """A type with a scale for every block, float16, whose codes are chosen one by one."""

    name: str
    points: Sequence[int]  # the codes, ascending: a range, or a table of integers between -128 and 127
    block: int = 32
    group: int = 32

    step = 1

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a code."""
        return 0 in self.points

    @property
    def terms(self) -> tuple[Term]:
        """The scale."""
        return (Term("d", to_half),)

    def nearest(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The codes nearest to x = W / scale [out, columns], as integers in float32; `weight` [columns]."""
        return nearest_code(x, self.points)

    def fit(self, W: Tensor, weight: Tensor) -> Scales:
        """Scales for W float32 [out, block] and weight [block]."""
        return by_rows(self._fit, W, weight)

    def _fit(self, W: Tensor, weight: Tensor) -> Scales:
        """Scales for a few thousand rows."""
        groups = Groups(W, weight, self.group)
        scale, _ = self._search(groups)
        return self.decoded({"d": groups.stored(scale)})

    def decoded(self, parts: Mapping[str, Tensor]) -> Scales:
        """Scales from what is stored: d float16 [out, blocks]."""
        return Scales(parts["d"].float(), None, dict(parts))

    def _sums(self, groups: Groups, scale: Tensor) -> Sums:
        """The sums for the codes that scales [groups, out] give."""
        return groups.sums(scale, None, self.points)

    def _search(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """The best scale of every group and sum(weight · code²), [groups, out]."""
        return search_scale(groups.x, groups.weight, groups.largest, self._starts(), self.points)

    def _starts(self) -> list[float]:
        """Scales that are tried, in units of the largest weight, which comes at most some steps beyond the first code,
        where it is cut off, or before it: more steps where there are more codes."""
        low, steps = self.points[0], len(self.points) - 1
        spread = (self.points[-1] - low) / steps * max(math.log2(steps + 1) - 1, 2)
        return [sign / (low + cut * spread) for cut in _STARTS for sign in (1, -1)]


@dataclass(frozen=True)
class PowerOfTwo(Symmetric):
    """A type whose scales are powers of two."""

    @property
    def terms(self) -> tuple[Term]:
        """The scale."""
        return (Term("scale", power_of_two),)

    def _fit(self, W: Tensor, weight: Tensor) -> Scales:
        """The best of the powers of two between half and four times the one at which the largest weight just fits."""
        groups = Groups(W, weight, self.group)
        first = power_of_two(groups.x.abs().amax(1) * groups.peak / self.points[-1]) / 2
        best, least = first, torch.full_like(first, torch.inf)
        for k in range(4):
            scale = first * 2**k / groups.peak
            _, wcc, wcx = self._sums(groups, scale)
            error = scale.square() * wcc - 2 * scale * wcx
            best, least = (first * 2**k).where(error < least, best), error.where(error < least, least)
        return self.decoded({"scale": power_of_two(best).t().contiguous()})

    def decoded(self, parts: Mapping[str, Tensor]) -> Scales:
        """Scales from what is stored: scale float32 [out, blocks]."""
        return Scales(parts["scale"].float(), None, dict(parts))


def power_of_two(x: Tensor) -> Tensor:
    """The nearest powers of two from 2^-126 to 2^124, elementwise, so that no value overflows."""
    part, exponent = torch.frexp(x.clamp(2.0**-126, 2.0**124))
    return torch.ldexp(torch.ones_like(x), exponent - (part < 0.75).int())


@dataclass(frozen=True)
class SuperBlock(Symmetric):
    """A type whose scales are `multipliers` times `unit` · d, which is float16 for every block."""

    block: int = 256
    multipliers: Multipliers = field(kw_only=True)
    unit: float = 1.0

    @property
    def terms(self) -> tuple[Term]:
        """The multiplier."""
        return (Term("multipliers", self.multipliers.nearest, "d", self.unit),)

    def _fit(self, W: Tensor, weight: Tensor) -> Scales:
        """Scales for a few thousand rows."""
        groups = Groups(W, weight, self.group)
        d, m = self._split(groups, *self._search(groups))
        m = self._best_neighbours(groups, d, m)
        return self.decoded({"d": groups.stored(d, self.unit), "multipliers": m.t().to(torch.int8)})

    def decoded(self, parts: Mapping[str, Tensor]) -> Scales:
        """Scales from what is stored: d float16 [out, blocks] and multipliers int8 [out, groups]."""
        d = parts["d"].float().repeat_interleave(self.block // self.group, dim=1)
        return Scales(d * parts["multipliers"] * self.unit, None, dict(parts))

    def _split(self, groups: Groups, scale: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """d [out] and multipliers [groups, out] with a small sum(power · (d · multiplier - scale)²)."""
        largest = scale.gather(0, scale.abs().argmax(0, keepdim=True))[0]
        edge = self.multipliers.low if self.multipliers.low < 0 else self.multipliers.high
        d, m, least = largest, scale, torch.full_like(largest, torch.inf)
        for k in range(_SPLITS):
            tried = groups.half(largest / (edge * (1 - k / (2 * _SPLITS))), self.unit)
            for _ in range(2):
                integers = self.multipliers.nearest(scale * inverse(tried))
                error = (power * (integers * tried - scale).square()).sum(0)
                better = error < least
                d, m, least = tried.where(better, d), integers.where(better, m), error.where(better, least)
                tried = quotient((power * integers * scale).sum(0), (power * integers.square()).sum(0))
                tried = groups.half(tried, self.unit)
        return d, m

    def _best_neighbours(self, groups: Groups, d: Tensor, m: Tensor) -> Tensor:
        """Of every multiplier and its neighbours the one with the least error, [groups, out]."""
        best, least = m, torch.full_like(m, torch.inf)
        for tried in self.multipliers.neighbours(m):
            scale = d * tried
            _, wcc, wcx = self._sums(groups, scale)
            error = scale.square() * wcc - 2 * scale * wcx
            best, least = tried.where(error < least, best), error.where(error < least, least)
        return best


def position(codes: Tensor, points: Sequence[int]) -> Tensor:
    """Where codes are in a table of points, int64; the next one for a number that is not in it."""
    return torch.searchsorted(torch.tensor(points, dtype=codes.dtype, device=codes.device), codes.contiguous())
