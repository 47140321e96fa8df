"""Adam on the entries of parameters that may change, stored without the others.

Of each parameter the kept entries are copied into a vector of float32, its master copy. Gradients are taken from the
kept entries as soon as a parameter has one, and the dense gradient is freed; Adam's two moments have the length of the
vector. After a step the parameters get the values of the vectors, in their own dtype, at the kept entries and nowhere
else: an entry that is zero cannot change, whatever the optimizer does.

In memory, for every parameter beside the model itself: a byte for the mask, and 16 bytes for each kept entry.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.distributed.collectives import all_reduce_, world

CLIP = 1.0  # largest norm of the gradient
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Kept:
    """A parameter and the mask, bool of its shape, of its entries that are trained.

    A rate is a share of `size`, by default the root mean square of these entries.
    """

    name: str
    parameter: nn.Parameter
    mask: Tensor
    size: float | None = None

    def packed(self, values: Tensor) -> Tensor:
        """The kept entries of `values`, which has the parameter's shape, as a float32 vector."""
        return values.detach()[self.mask].float()

    @torch.no_grad()
    def restore_(self, entries: Tensor) -> None:
        """Give the parameter's kept entries other values."""
        self.parameter.masked_scatter_(self.mask, entries.to(self.parameter.dtype))


def values_of(kept: Sequence[Kept]) -> dict[str, Tensor]:
    """The kept entries by parameter, float32."""
    return {k.name: k.packed(k.parameter) for k in kept}


def give_(kept: Sequence[Kept], values: Mapping[str, Tensor]) -> None:
    """Give all kept entries other values, by parameter."""
    for k in kept:
        k.restore_(values[k.name])


class KeptAdam:
    """The optimizer; it collects gradients until `close` is called. Sizes are those of the entries as they are now."""

    def __init__(self, kept: Sequence[Kept]) -> None:
        self.kept = kept
        self.masters = [nn.Parameter(k.packed(k.parameter), requires_grad=False) for k in kept]
        self.sizes = [_size(m) if k.size is None else k.size for k, m in zip(kept, self.masters, strict=True)]
        groups = [{"params": [m], "lr": 0.0} for m in self.masters]
        self._adam = torch.optim.Adam(groups, betas=BETAS, foreach=False)
        self._handles = [
            k.parameter.register_post_accumulate_grad_hook(lambda p, k=k, m=m: _collect(p, k, m))
            for k, m in zip(kept, self.masters, strict=True)
        ]

    def share_gradients_(self) -> None:
        """Sum the gradients over all processes; parameters without one in any process have none afterwards."""
        if world() == 1:
            return
        used = all_reduce_(torch.tensor([float(m.grad is not None) for m in self.masters]))
        for master, some in zip(self.masters, used.tolist(), strict=True):
            if some:
                master.grad = all_reduce_(torch.zeros_like(master) if master.grad is None else master.grad)

    def step(self, share: float) -> None:
        """One step with the gradients collected since the last one; `share` of each parameter's size is its rate."""
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        for group, size in zip(self._adam.param_groups, self.sizes, strict=True):
            group["lr"] = share * size
        self._adam.step()
        self._adam.zero_grad()
        for k, master in zip(self.kept, self.masters, strict=True):
            k.restore_(master.detach())

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
        self.sizes = state["sizes"].tolist()
        for k, m in zip(self.kept, self.masters, strict=True):
            m.copy_(state[f"{k.name}|master"])
            own = {name.rpartition("|")[2]: v for name, v in state.items() if name.rpartition("|")[0] == k.name}
            self._adam.state[m] = {key: value.clone() for key, value in own.items() if key != "master"}
            k.restore_(m.detach())


def _size(entries: Tensor) -> float:
    return float(entries.square().mean().sqrt()) if entries.numel() else 0.0


def _collect(p: Tensor, kept: Kept, master: nn.Parameter) -> None:
    """Move the gradient of a parameter's kept entries to its master copy."""
    assert p.grad is not None
    entries = kept.packed(p.grad)
    master.grad = entries if master.grad is None else master.grad + entries
    p.grad = None
