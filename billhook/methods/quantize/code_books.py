"""Types whose codes are vectors of a code book: iq2_xxs, iq2_xs, iq2_s (8 columns), iq3_xxs, iq3_s (4 columns).

A code is a point of the book, whose numbers are positive, and a sign for every column. In iq2_xxs, iq2_xs and iq3_xxs
the number of minus signs in 8 columns is even, so that seven are stored. The books are those of the `gguf` package.

The nearest code is searched among all points. Where x has an odd number of minus signs, that of the column with the
smallest weight · |x| is turned first, and then counts against large points: within 1 % of the least error.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.quantize.groups import ROWS, Groups
from billhook.methods.quantize.symmetric import SuperBlock, position
from billhook.runtime.codes import Sums, closest, search_scale
from billhook.runtime.plain_codes import better, inverse, quotient

_STARTS = torch.linspace(0.5, 1.25, 8).tolist()  # the largest weight in units of the largest number of the book
_AROUND = (0.85, 1.0, 1.15)  # scales that are tried with the book, in units of the one found without
_SIGNED = 8  # columns whose signs are stored together


@cache
def book(name: str, device: torch.device | None = None) -> Tensor:
    """The points of a code book, float32 [points, columns]. Raises BillhookError if `gguf` is not installed."""
    try:
        from gguf import quants
    except ImportError:
        raise BillhookError(f"{name} needs the code books of the gguf package: pip install gguf.") from None
    table = getattr(quants, name.upper())
    table.init_grid()
    return torch.tensor(table.grid[0, 0], device=device)


@dataclass(frozen=True)
class CodeBook(SuperBlock):
    """A type with vectors of `dim` columns, of which `even` tells whether the number of minus signs is even."""

    dim: int = 8
    even: bool = False
    has_zero = False

    @property
    def step(self) -> int:  # type: ignore[override]
        """The columns of a code."""
        return _SIGNED if self.even else self.dim

    def nearest(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The codes nearest to x = W / scale [out, columns], as integers in float32; `weight` [columns]."""
        weight = torch.ones(x.shape[1], device=x.device) if weight is None else weight
        codes = torch.empty_like(x)
        for rows, found in zip(x.split(ROWS), codes.split(ROWS), strict=True):
            for v, w, code in zip(*(t.split(self.step, t.dim() - 1) for t in (rows, weight, found)), strict=True):
                code.copy_(self._vector(v, w))
        return codes

    def index(self, codes: Tensor) -> Tensor:
        """The numbers in the book of codes [..., columns], int64 [..., columns / dim]."""
        levels, points = len(self.points), book(self.name, codes.device).to(codes.dtype)
        places = levels ** torch.arange(self.dim, device=codes.device)
        numbers = torch.zeros(levels**self.dim, dtype=torch.long, device=codes.device)
        numbers[(position(points, self.points) * places).sum(1)] = torch.arange(len(points), device=codes.device)
        return numbers[(position(codes.abs(), self.points).unflatten(-1, (-1, self.dim)) * places).sum(-1)]

    def _sums(self, groups: Groups, scale: Tensor) -> Sums:
        """The sums for the codes that scales [groups, out] give."""
        x = (groups.x * inverse(scale)[:, None]).flatten(0, 1).t()
        return groups.sums_of(self.nearest(x, groups.weight.flatten()).t().reshape(groups.x.shape))

    def _vector(self, x: Tensor, weight: Tensor) -> Tensor:
        """The codes nearest to x [out, step] with weight [step]."""
        sign = torch.where(x < 0, -1.0, 1.0)
        if self.even:
            least = (x.abs() * weight).argmin(1, keepdim=True)
            sign.scatter_(1, least, sign.gather(1, least) * sign.prod(1, keepdim=True))
        size = (x * sign).t()
        found = [self._point(a, w) for a, w in zip(size.split(self.dim), weight.split(self.dim), strict=True)]
        return torch.cat(found).t().mul_(sign)

    def _point(self, x: Tensor, weight: Tensor) -> Tensor:
        """The points nearest to x [dim, out] with weight [dim]."""
        points = book(self.name, x.device)
        table = torch.cat([points * weight, (points.square() @ weight)[:, None] / -2], 1)
        return points.t().index_select(1, closest(x, table))

    def _search(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """The best scale of every group and sum(weight · code²), [groups, out]: first without the book, by numbers."""
        largest = groups.x.abs().amax(1) / self.points[-1]
        scale, _ = search_scale(groups.x, groups.weight, largest, _STARTS, self.points, mirrored=True)
        found: tuple[Tensor, ...] = ()
        for factor in _AROUND:
            _, power, product = self._sums(groups, scale * factor)
            improved = quotient(product, power)
            found = better((-product * improved, improved, power), found)
        return found[1], found[2]
