"""Scalar types `intB/GROUP`: signed integers of B bits with one 16-bit scale for every GROUP columns, no offset.

The codes are −2^(B−1) … 2^(B−1) − 1, and a scale may be negative, so that the longer side of the grid can point either
way; zero is always a point. This halves the loss at 3 bits compared with a symmetric range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Scales, Term
from billhook.methods.quantize.groups import Groups
from billhook.runtime.codes import search_scale
from billhook.runtime.plain_codes import nearest_code

_CANDIDATES = 16  # scales tried for each sign


@dataclass(frozen=True)
class Scalar:
    """The grid of `bits`-bit integers with a scale of dtype `stored` for every `group` columns."""

    bits: int
    group: int
    stored: torch.dtype = torch.float16

    step = 1
    has_zero = True

    @property
    def points(self) -> Sequence[int]:
        """The codes."""
        half = 1 << (self.bits - 1)
        return range(-half, half)

    @property
    def terms(self) -> tuple[Term]:
        """A free scale."""
        return (Term("scale", self.store),)

    @property
    def name(self) -> str:
        """The name of the storage type."""
        return f"int{self.bits}/{self.group}"

    @property
    def block(self) -> int:
        """Columns whose scales are chosen together."""
        return self.group

    def fit(self, W: Tensor, weight: Tensor) -> Scales:
        """The best of some scales between the one at which the largest weight just fits and one that clips it, each
        improved twice by least squares and rounded to its dtype at the end.

        W is float32 [out, group], weight [group].
        """
        groups = Groups(W, weight, self.group)
        least = 0.3 if self.bits == 2 else 1 - 1.6 / (1 << (self.bits - 1))
        factors = torch.linspace(least, 1.05, _CANDIDATES).tolist()
        tried = [side * factor / self.points[0] for factor in factors for side in (1, -1)]
        scale, _ = search_scale(groups.x, groups.weight, groups.largest, tried, self.points)
        return self.decoded({"scale": self.store(scale * groups.peak).t().contiguous().to(self.stored)})

    def decoded(self, parts: Mapping[str, Tensor]) -> Scales:
        """Scales from what is stored: scale [out, groups] in its dtype."""
        return Scales(parts["scale"].float(), None, dict(parts))

    def store(self, scale: Tensor) -> Tensor:
        """A scale rounded to its dtype in the file, in float32; one that would overflow is the largest possible."""
        most = torch.finfo(self.stored).max
        return scale.clamp(-most, most).to(self.stored).float()

    def nearest(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The nearest integers in range."""
        return nearest_code(x, self.points)
