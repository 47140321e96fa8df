"""Grids: the values that a storage type can represent.

A weight is stored as small integers, its codes, and a few numbers for every `group` consecutive columns of a row:

    value = scale · code + offset

The codes are points of the grid: consecutive integers for scalar types, other integers for fitted points and code
books. `offset` is the minimum of an asymmetric type. How scale and offset are stored (a 16-bit number, or a 6-bit
integer times a scale of `block` columns) is the grid's business: `fit` returns values that the file can hold, so that
codes are chosen for exactly what a reader will compute.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from billhook.errors import JobError


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales, float32 [out, groups], as stored; `offset` likewise, or None for a symmetric type.

    `parts` are the numbers in the file from which they follow, [out, ...] each, by a name of the grid's own.
    """

    scale: Tensor
    offset: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def join(cls, scales: Sequence["Scales"], dim: int = 1) -> "Scales":
        """The scales of columns side by side, or of rows (`dim=0`) one below the other."""
        parts = {name: torch.cat([s.parts[name] for s in scales], dim) for name in scales[0].parts}
        offsets = [s.offset for s in scales if s.offset is not None]
        return cls(torch.cat([s.scale for s in scales], dim), torch.cat(offsets, dim) if offsets else None, parts)


@dataclass(frozen=True)
class Term:
    """A stored number that every group has: it adds unit · number · code to each value, or unit · number if `constant`.

    The unit is `factor` times the part `base`, of which a block has one, or 1. `nearest` gives the numbers that can be
    stored nearest to any, elementwise.
    """

    part: str
    nearest: Callable[[Tensor], Tensor]
    base: str = ""
    factor: float = 1.0
    constant: bool = False


class Grid(Protocol):
    """The grid of a storage type.

    Scales are chosen for `block` columns at once, one or several groups of `group` columns; a layer's columns
    are a multiple of `block`. Codes are chosen for `step` consecutive columns at once: 1, or the length of the vectors
    of a code book.
    """

    @property
    def name(self) -> str:
        """The name of the storage type."""
        ...

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        ...

    @property
    def block(self) -> int:
        """Columns whose scales are chosen together."""
        ...

    @property
    def step(self) -> int:
        """Columns that share a code."""
        ...

    def fit(self, W: Tensor, weight: Tensor) -> Scales:
        """Scales with a small error sum(weight · (W - value)²) for W float32 [out, block] and weight [block]."""
        ...

    @property
    def has_zero(self) -> bool:
        """Whether the code 0 stands for the value 0 and can be stored in any column."""
        ...

    @property
    def terms(self) -> Sequence[Term]:
        """The numbers that a group's scale and offset consist of."""
        ...

    def decoded(self, parts: Mapping[str, Tensor]) -> Scales:
        """Scales from what is stored."""
        ...

    @property
    def points(self) -> Sequence[int]:
        """The codes, ascending: a range, or a tuple of numbers between -128 and 127; of a code book their sizes."""
        ...

    def nearest(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The codes nearest to x = (W - offset) / scale, float32 [out, columns], as integers in float32.

        The number of columns is a multiple of `step`; `weight` [columns] tells how much each counts in its vector.
        """
        ...


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight on a grid: `codes` int8 [out, in] and `scales`. Raises JobError for scales that are not finite."""

    grid: Grid
    codes: Tensor
    scales: Scales

    def __post_init__(self) -> None:
        numbers = [self.scales.scale] + ([] if self.scales.offset is None else [self.scales.offset])
        if not all(bool(torch.isfinite(x).all()) for x in numbers):
            raise JobError("the scales are not finite: leave the layer out with --ignore, or use a wider type.")

    @classmethod
    def join(cls, parts: Sequence["Quantized"]) -> "Quantized":
        """A weight from some of its rows each."""
        scales, names = [part.scales for part in parts], parts[0].scales.parts
        numbers = {name: torch.cat([s.parts[name] for s in scales]) for name in names}
        return cls(parts[0].grid, torch.cat([part.codes for part in parts]), parts[0].grid.decoded(numbers))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The values [out, in] as a reader of the file computes them, in float32, rounded to `dtype`."""
        return dequantize(self.codes, self.scales).to(dtype)

    def check(self, stored: Tensor) -> list[str]:
        """Raise JobError unless `stored` [out, in] holds the decoded values."""
        if not torch.equal(stored, self.decode(stored.dtype)):
            raise JobError(f"the weight in the model is not what {self.grid.name} stores. The result is not saved.")
        return []


def dequantize(codes: Tensor, scales: Scales) -> Tensor:
    """scale · code + offset, float32 [out, in]."""
    out, columns = codes.shape
    values = codes.float().view(out, scales.scale.shape[1], -1) * scales.scale[:, :, None]
    if scales.offset is not None:
        values += scales.offset[:, :, None]
    return values.view(out, columns)


def safe_scale(scale: Tensor, group: int) -> Tensor:
    """Scales [out, groups] repeated for every column, [out, groups · group], with 1 in place of 0."""
    return scale.where(scale != 0, 1).repeat_interleave(group, dim=1)
