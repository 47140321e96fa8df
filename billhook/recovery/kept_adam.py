"""Adam on what may change of parameters, stored without the rest.

Of each parameter the entries that are kept, or the scales of its quantized weight, are copied into a vector of float32,
its master copy. A gradient becomes one of the vector as soon as the parameter has it, and is freed; Adam's two moments
have the length of the vector. After a step the parameters get the values of the vectors, in their own dtype, and
nothing else of them changes: an entry that is zero stays zero, whatever the optimizer does.

In memory, beside the model itself: a byte for each entry of a parameter, and 16 bytes for each number of a vector.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from billhook.distributed.collectives import all_reduce_, world
from billhook.distributed.shards import is_sharded, local
from billhook.methods.quantize.grid import Quantized, dequantize

CLIP = 1.0  # largest norm of the gradient
BETAS = (0.8, 0.95)  # less momentum than usual, as runs have few steps


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
    def size(self) -> float | None:
        """What a rate is a share of; None: their root mean square."""
        ...

    def values(self) -> Tensor:
        """The numbers as they are, a float32 vector."""
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


@dataclass(frozen=True)
class Kept:
    """The entries of a parameter where `mask`, bool of its shape, is true; of a sharded one those of this process."""

    name: str
    parameter: nn.Parameter
    stored: torch.dtype
    mask: Tensor
    size: float | None = None

    @property
    def count(self) -> int:
        """The number of kept entries."""
        return int(self.mask.sum())

    def values(self) -> Tensor:
        """The kept entries."""
        return self.gradient(self.parameter)

    def gradient(self, gradient: Tensor) -> Tensor:
        """The kept entries of a gradient."""
        return local(gradient.detach())[self.mask].float()

    @torch.no_grad()
    def restore_(self, values: Tensor) -> None:
        """Give the kept entries other values."""
        local(self.parameter.detach()).masked_scatter_(self.mask, values.to(self.parameter.dtype))

    def came_back(self) -> int:
        """How many other entries are not zero."""
        return int(torch.count_nonzero(local(self.parameter.detach()).masked_fill(self.mask, 0)))


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
    def weight(self) -> Quantized:
        """The weight with the scales as they are now, in the dtype in which they are stored."""
        parts = {name: part.to(self._parts[name].dtype) for name, part in self._with(self._values).items()}
        return Quantized(self._grid, self._codes, self._grid.decoded(parts))

    def values(self) -> Tensor:
        """The numbers."""
        return self._values

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


class KeptAdam:
    """The optimizer; it collects gradients until `close` is called. Sizes are those of the numbers as they are now.

    The norm of all gradients together is at most `clip` in a step. The parameters require gradients already. Where they
    are sharded, sizes and the norm are those of whole parameters.
    """

    def __init__(self, kept: Sequence[Trained], *, betas: tuple[float, float] = BETAS, clip: float = CLIP) -> None:
        self.kept, self._clip = kept, clip
        self.masters = [nn.Parameter(k.values().clone(), requires_grad=False) for k in kept]
        self.sharded = are_sharded(kept)
        known, measured = [k.size for k in kept], _sizes(self.masters, self.sharded)
        self.sizes = [size if own is None else own for own, size in zip(known, measured, strict=True)]
        groups = [{"params": [m], "lr": 0.0} for m in self.masters]
        self._adam = torch.optim.Adam(groups, betas=betas, foreach=False)
        self._handles = [
            k.parameter.register_post_accumulate_grad_hook(lambda p, k=k, m=m: _collect(p, k, m))
            for k, m in zip(kept, self.masters, strict=True)
        ]

    def share_gradients_(self) -> None:
        """Sum the gradients over all processes; parameters without one in any process have none afterwards."""
        if world() == 1:
            return
        if self.sharded:  # FSDP2 gives this process the mean of its part
            for master in self.masters:
                if master.grad is not None:
                    master.grad.mul_(world())
            return
        used = all_reduce_(torch.tensor([float(m.grad is not None) for m in self.masters]))
        for master, some in zip(self.masters, used.tolist(), strict=True):
            if some:
                master.grad = all_reduce_(torch.zeros_like(master) if master.grad is None else master.grad)

    def step(self, share: float, scale: float = 1.0) -> None:
        """One step with the gradients collected since the last one, which are those of the loss times `scale`; `share`
        of each parameter's size is its rate."""
        for master in self.masters:
            if master.grad is not None and scale != 1:
                master.grad.div_(scale)
        if math.isfinite(self._clip):
            self._limit_norm()
        for group, size in zip(self._adam.param_groups, self.sizes, strict=True):
            group["lr"] = share * size
        self._adam.step()
        self._adam.zero_grad()
        for k, master in zip(self.kept, self.masters, strict=True):
            k.restore_(master.detach())

    def _limit_norm(self) -> None:
        """Scale all gradients so that their norm is at most the limit."""
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        if self.sharded:
            norm = all_reduce_(norm.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.masters, self._clip, norm)

    def close(self) -> None:
        """Stop collecting gradients."""
        for handle in self._handles:
            handle.remove()

    def values(self) -> dict[str, Tensor]:
        """Copies of the master copies by parameter."""
        return {k.name: m.detach().clone() for k, m in zip(self.kept, self.masters, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """The master copies, the moments and the number of steps, as tensors with names."""
        found = {f"{name}|master": value for name, value in self.values().items()}
        for k, m in zip(self.kept, self.masters, strict=True):
            found |= {f"{k.name}|{key}": value for key, value in self._adam.state[m].items()}
        return found | {"sizes": torch.tensor(self.sizes, dtype=torch.float64)}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`; the model gets its values too."""
        self.sizes, moments = state["sizes"].tolist(), dict[str, dict[str, Tensor]]()
        for name, value in state.items():
            parameter, _, key = name.rpartition("|")
            if key not in ("master", "sizes"):
                moments.setdefault(parameter, {})[key] = value
        for k, m in zip(self.kept, self.masters, strict=True):
            m.copy_(state[f"{k.name}|master"])
            self._adam.state[m] = {key: value.clone() for key, value in moments[k.name].items()}
            k.restore_(m.detach())


def _sizes(masters: Sequence[Tensor], sharded: bool) -> list[float]:
    """The root mean square of each vector, zero of an empty one; `sharded` ones are parts of vectors."""
    if not sharded:
        return [float(m.square().mean().sqrt()) if m.numel() else 0.0 for m in masters]
    sums = all_reduce_(torch.tensor([[float(m.square().sum()), m.numel()] for m in masters], dtype=torch.float64))
    return [math.sqrt(total / max(1, count)) for total, count in sums.tolist()]


def _collect(p: Tensor, kept: Trained, master: nn.Parameter) -> None:
    """Move the gradient of a parameter to its master copy."""
    assert p.grad is not None
    entries = kept.gradient(p.grad)
    master.grad = entries if master.grad is None else master.grad + entries
    p.grad = None
