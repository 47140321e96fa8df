"""Scalar types `intB/GROUP`: signed integers of B bits with one 16-bit scale for every GROUP columns, no offset.

The codes are −2^(B−1) … 2^(B−1) − 1, and a scale may be negative, so that the longer side of the grid can point either
way; zero is always a point. This halves the loss at 3 bits compared with a symmetric range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Scales, Term
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
        """The best of some scales between the one at which the largest weight just fits and one that clips it.

        W is float32 [out, group], weight [group].
        """
        low = self.points[0]
        largest = W.gather(1, W.abs().argmax(1, keepdim=True))
        least = 0.3 if self.bits == 2 else 1 - 1.6 / (1 << (self.bits - 1))
        weighted = W * weight
        best, scale = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
        for factor in torch.linspace(least, 1.05, _CANDIDATES).tolist():
            for side in (factor, -factor):
                tried = self.store(largest / low * side)
                codes = self.nearest(W / tried.where(tried != 0, 1))
                power = (codes * codes) @ weight[:, None]
                fitted = self.store((weighted * codes).sum(1, keepdim=True) / power.where(power > 0, 1))
                error = (W - codes * fitted).square() @ weight[:, None]
                better = (error < best) & (fitted != 0)
                best, scale = error.where(better, best), fitted.where(better, scale)
        return self.decoded({"scale": scale.to(self.stored)})

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
