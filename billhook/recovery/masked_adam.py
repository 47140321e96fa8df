"""Adam on what may change of parameters, stored without the rest.

What is trained of each parameter (`billhook.recovery.trained`) is copied into a vector of float32, its master copy. A
gradient becomes one of the vector as soon as the parameter has it, and is freed; Adam's two moments have the length of
the vector. After a step the parameters get the values of the vectors, in their own dtype.

In memory, beside the model itself: 16 bytes for each number of a vector and, where some entries are not kept, 4 for its
position.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from billhook.distributed.collectives import all_reduce_, world
from billhook.recovery.trained import Trained, are_sharded

CLIP = 1.0  # largest norm of the gradient
BETAS = (0.8, 0.95)  # less momentum than usual, as runs have few steps


class MaskedAdam:
    """The optimizer; it collects gradients until `close` is called. Sizes are those of the numbers as they are now.

    The norm of all gradients together is at most `clip` in a step. The parameters require gradients already. Where they
    are sharded, sizes and the norm are those of whole parameters.
    """

    def __init__(self, kept: Sequence[Trained], *, betas: tuple[float, float] = BETAS, clip: float = CLIP) -> None:
        self.kept, self._clip = kept, clip
        self.masters = [nn.Parameter(k.values(), requires_grad=False) for k in kept]
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
