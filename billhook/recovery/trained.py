"""What is trained of a model's parameters: vectors of numbers from which the parameters follow.

These are the entries that are kept of a parameter, or the scales of its quantized weight. What is not in a vector never
changes: an entry that is zero stays zero, whatever an optimizer does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from billhook.distributed.shards import is_sharded, local
from billhook.methods.quantize.grid import Quantized, dequantize


class Trained(Protocol):
    """What is trained of a parameter: some numbers from which it follows."""

    @property
    def name(self) -> str:
        """The parameter's name."""
        ...

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter."""
        ...

    @property
    def stored(self) -> torch.dtype:
        """The dtype that the numbers have in the files."""
        ...

    @property
    def count(self) -> int:
        """How many numbers there are."""
        ...

    @property
    def held(self) -> int:
        """The bytes that are held to find the numbers in the parameter."""
        ...

    @property
    def size(self) -> float | None:
        """What a rate is a share of; None: their root mean square."""
        ...

    def values(self) -> Tensor:
        """A copy of the numbers, a float32 vector."""
        ...

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient by the numbers, a float32 vector, from that by the parameter."""
        ...

    def restore_(self, values: Tensor) -> None:
        """Give the parameter the values that follow from other numbers."""
        ...

    def came_back(self) -> int:
        """How many entries that were zero have values."""
        ...


class Kept:
    """The entries of a parameter where `mask`, bool of its shape, is true; of a sharded one those of this process.

    Their positions are held, not the mask: a vector is read and written by positions many times as fast.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, stored: torch.dtype, mask: Tensor, size: float | None = None
    ) -> None:
        self.name, self.parameter, self.stored, self.size = name, parameter, stored, size
        self.count = int(mask.sum())
        # in the flat parameter; None: every entry is kept
        self._positions = None if self.count == mask.numel() else _narrow(mask.reshape(-1).nonzero().reshape(-1))

    @property
    def held(self) -> int:
        """The bytes of the positions."""
        return 0 if self._positions is None else self._positions.nbytes

    @property
    def mask(self) -> Tensor:
        """The mask."""
        entries = local(self.parameter.detach())
        if self._positions is None:
            return torch.ones_like(entries, dtype=torch.bool)
        flat = torch.zeros(entries.numel(), dtype=torch.bool, device=entries.device)
        return flat.index_fill_(0, self._positions.long(), True).view(entries.shape)

    def values(self) -> Tensor:
        """A copy of the kept entries."""
        entries = self.gradient(self.parameter)
        return entries.clone() if self._positions is None else entries

    def gradient(self, gradient: Tensor) -> Tensor:
        """The kept entries of a gradient, in its memory where all are kept."""
        flat = local(gradient.detach()).reshape(-1)
        return (flat if self._positions is None else flat.index_select(0, self._positions)).float()

    @torch.no_grad()
    def restore_(self, values: Tensor) -> None:
        """Give the kept entries other values."""
        entries = local(self.parameter.detach())
        values = values.to(entries.dtype)
        if self._positions is None:
            entries.copy_(values.view(entries.shape))
            return
        flat = entries.reshape(-1).scatter_(0, self._positions.long(), values)
        if not entries.is_contiguous():  # `flat` is a copy
            entries.copy_(flat.view(entries.shape))

    def came_back(self) -> int:
        """How many other entries are not zero."""
        everywhere, kept = local(self.parameter.detach()), self.gradient(self.parameter)
        return int(torch.count_nonzero(everywhere) - torch.count_nonzero(kept))


def _narrow(positions: Tensor) -> Tensor:
    """Positions as int32 where these are large enough."""
    return positions.int() if not len(positions) or int(positions[-1]) < 2**31 else positions


def free_parts(weight: Quantized) -> list[str]:
    """The parts of the scales of a weight that can have any value of 16 bits; none where scales are powers of two."""
    return [name for name, part in weight.scales.parts.items() if part.dtype in (torch.float16, torch.bfloat16)]


class Scaled:
    """The scales of a quantized weight: the numbers of 16 bits from which its grid computes scale and minimum.

    `view` gives the matrix [out, in] of the parameter, or of its gradient: the parameter itself by default.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        weight: Quantized,
        view: Callable[[Tensor], Tensor] = lambda stored: stored,
    ) -> None:
        self.name, self.parameter, self._view = name, parameter, view
        self.size: float | None = None
        self._grid, self._codes = weight.grid, weight.codes.to(parameter.device)
        self._parts = {name: part.to(parameter.device) for name, part in weight.scales.parts.items()}
        self._free = free_parts(weight)
        self.stored = self._parts[self._free[0]].dtype
        self._values = torch.cat([self._parts[name].float().flatten() for name in self._free])

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return len(self._values)

    @property
    def held(self) -> int:
        """The bytes of the codes."""
        return self._codes.nbytes

    @property
    def weight(self) -> Quantized:
        """The weight with the scales as they are now, in the dtype in which they are stored."""
        parts = {name: part.to(self._parts[name].dtype) for name, part in self._with(self._values).items()}
        return Quantized(self._grid, self._codes, self._grid.decoded(parts))

    def values(self) -> Tensor:
        """A copy of the numbers."""
        return self._values.clone()

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient by the numbers, through the decoded weight."""
        with torch.enable_grad():
            values = self._values.detach().requires_grad_()
            decoded = dequantize(self._codes, self._grid.decoded(self._with(values)))
        return torch.autograd.grad(decoded, values, self._view(gradient.detach()).float())[0]

    @torch.no_grad()
    def restore_(self, values: Tensor) -> None:
        """Give the weight other scales."""
        self._values = values.float().clone()
        self._view(self.parameter).copy_(dequantize(self._codes, self._grid.decoded(self._with(self._values))))

    def came_back(self) -> int:
        """How many entries with the code zero are not zero."""
        here = self._view(self.parameter.detach())
        return int(torch.count_nonzero(here.masked_fill(self._codes != 0, 0))) if self._grid.has_zero else 0

    def _with(self, values: Tensor) -> dict[str, Tensor]:
        """The parts of the scales, those of 16 bits from a vector."""
        shapes = [self._parts[name].shape for name in self._free]
        pieces = values.split([shape.numel() for shape in shapes])
        return self._parts | {n: v.view(shape) for n, v, shape in zip(self._free, pieces, shapes, strict=True)}


def values_of(kept: Sequence[Trained]) -> dict[str, Tensor]:
    """The numbers that are trained by parameter, float32."""
    return {k.name: k.values() for k in kept}


def give_(kept: Sequence[Trained], values: Mapping[str, Tensor]) -> None:
    """Give all parameters other numbers, by parameter."""
    for k in kept:
        k.restore_(values[k.name])


def are_sharded(kept: Sequence[Trained]) -> bool:
    """Whether every process has its own part of what is trained."""
    return any(is_sharded(k.parameter) for k in kept)
