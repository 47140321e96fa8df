"""Types with a minimum, whose codes are 0 ... `high`.

    q4_1 q5_1         value = d · code + m                                    d, m float16 for every 32 columns
    q2_k q4_k q5_k    value = (d · multiplier) · code - (dmin · minimum)      two small integers for every group

`fit` starts from ranges that cut off or extend the ends of a group by part of a step, and improves scale and offset by
least squares; then as in `symmetric`, for the two integers of a group together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Scales, Term
from billhook.methods.quantize.groups import Groups, by_rows, to_half
from billhook.methods.quantize.symmetric import Multipliers
from billhook.runtime.codes import Sums, search_range
from billhook.runtime.plain_codes import better, inverse, nearest_code, quotient, range_error, solve_range

_CUTS = (-0.5, 0.0, 0.5, 1.1)  # steps by which an end of the range is cut off
_SPLITS = 8
_ROUNDS = 2


@dataclass(frozen=True)
class Affine:
    """A type with a float16 scale and a float16 minimum for a block of columns."""

    name: str
    high: int
    block: int = 32
    group: int = 32

    step = 1
    has_zero = False

    @property
    def points(self) -> Sequence[int]:
        """The codes."""
        return range(self.high + 1)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The scale and the minimum."""
        return Term("d", to_half), Term("m", to_half, constant=True)

    def nearest(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The codes nearest to x = (W - offset) / scale [out, columns], as integers in float32; `weight` [columns]."""
        return nearest_code(x, self.points)

    def fit(self, W: Tensor, weight: Tensor) -> Scales:
        """Scales and offsets for W float32 [out, block] and weight [block]."""
        return by_rows(self._fit, W, weight)

    def _fit(self, W: Tensor, weight: Tensor) -> Scales:
        """Scales and offsets for a few thousand rows."""
        groups = Groups(W, weight, self.group)
        scale, offset, _ = self._search(groups, torch.inf)
        found: tuple[Tensor, ...] = ()
        for _ in range(_ROUNDS):
            scale, offset = groups.half(scale), groups.half(offset)
            sums = groups.sums(scale, offset, self.points)
            found = better((range_error(groups.sum_w, groups.sum_wx, sums, scale, offset), scale, offset), found)
            scale, offset = solve_range(groups.sum_w, groups.sum_wx, sums, torch.inf)
        return self.decoded({"d": groups.stored(found[1]), "m": groups.stored(found[2])})

    def decoded(self, parts: Mapping[str, Tensor]) -> Scales:
        """Scales from what is stored: d and m float16 [out, blocks]."""
        return Scales(parts["d"].float(), parts["m"].float(), dict(parts))

    def _search(self, groups: Groups, most: float) -> Sums:
        """The best scale and offset (not above `most`) of every group, and sum(weight · code²); [groups, out]."""
        return search_range(groups.x, groups.weight, list(product(_CUTS, _CUTS)), most, self.high)


@dataclass(frozen=True)
class KMinimum(Affine):
    """A type whose scales and minima are `multipliers` of d and dmin, float16 for a block of columns."""

    block: int = 256
    multipliers: Multipliers = field(kw_only=True)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The multiplier and the minimum."""
        nearest = self.multipliers.nearest
        return Term("multipliers", nearest, "d"), Term("minima", nearest, "dmin", -1.0, constant=True)

    def _fit(self, W: Tensor, weight: Tensor) -> Scales:
        """Scales and offsets for a few thousand rows."""
        groups = Groups(W, weight, self.group)
        scale, offset, power = self._search(groups, 0.0)
        d, a = self._split(groups, scale, power)
        dmin, b = self._split(groups, -offset, groups.sum_w)
        found: tuple[Tensor, ...] = ()
        for _ in range(_ROUNDS):
            error, a, b, *sums = self._improve(groups, d, a, dmin, b)
            found = better((error.sum(0), d, a, dmin, b), found)
            d, dmin = _solve_block(groups, a, b, sums, (d, dmin))
        _, d, a, dmin, b = found
        parts = {"d": groups.stored(d), "dmin": groups.stored(dmin)}
        return self.decoded(parts | {"multipliers": a.t().to(torch.int8), "minima": b.t().to(torch.int8)})

    def decoded(self, parts: Mapping[str, Tensor]) -> Scales:
        """Scales from what is stored: d, dmin float16 [out, blocks], multipliers and minima int8 [out, groups]."""
        a, b = parts["multipliers"], parts["minima"]
        d, dmin = (parts[name].float().repeat_interleave(self.block // self.group, dim=1) for name in ("d", "dmin"))
        return Scales(d * a, -(dmin * b), dict(parts))

    def _split(self, groups: Groups, value: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """d [out] and integers [groups, out] with a small sum(power · (d · integer - value)²)."""
        found: tuple[Tensor, ...] = ()
        for k in range(_SPLITS):
            d = groups.half(value.amax(0) / (self.multipliers.high - k / 2))
            for _ in range(2):
                integers = self.multipliers.nearest(value * inverse(d))
                found = better(((power * (integers * d - value).square()).sum(0), d, integers), found)
                d = groups.half(quotient((power * integers * value).sum(0), (power * integers.square()).sum(0)))
        return found[1], found[2]

    def _improve(self, groups: Groups, d: Tensor, a: Tensor, dmin: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """The error [groups, out], multipliers, minima and sums of the best neighbours of every pair of integers."""
        found: tuple[Tensor, ...] = ()
        for multiplier, minimum in product(self.multipliers.neighbours(a), self.multipliers.neighbours(b)):
            scale, offset = d * multiplier, -(dmin * minimum)
            sums = groups.sums(scale, offset, self.points)
            error = range_error(groups.sum_w, groups.sum_wx, sums, scale, offset)
            found = better((error, multiplier, minimum, *sums), found)
        return found


def _solve_block(groups: Groups, a: Tensor, b: Tensor, sums: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """The best d and dmin [out], as stored, for some codes and integers; the old ones where it is not unique."""
    wc, wcc, wcx = sums
    dd, dm, mm = (a * a * wcc).sum(0), (a * b * wc).sum(0), (b * b * groups.sum_w).sum(0)
    dx, mx = (a * wcx).sum(0), (b * groups.sum_wx).sum(0)
    determinant = dd * mm - dm.square()
    new = (mm * dx - dm * mx) / determinant, (dm * dx - dd * mx) / determinant
    regular = (determinant > 1e-6 * dd * mm) & (new[0] > 0) & (new[1] > 0)
    return [groups.half(x.where(regular, y)) for x, y in zip(new, old, strict=True)]
