"""Mixtures of experts: what every expert does on the calibration text, and a router that knows only some of them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.units import Unit, router_of
from billhook.distributed.collectives import unshard
from billhook.engine.replay import run_block
from billhook.engine.walk import Block
from billhook.errors import BillhookError

Routed = tuple[Tensor, Tensor, Tensor]  # hidden states [tokens, width]; numbers, weights of their experts [tokens, k]


def mixture_of(model: PreTrainedModel, unit: Unit) -> tuple[nn.Module, nn.Module]:
    """The router and the experts of a unit."""
    module = model.get_submodule(unit.name.rpartition(":")[0])
    found = router_of(module)
    assert found is not None
    return found[1], module.get_submodule("experts")


@torch.no_grad()
def routed(block: Block, experts: nn.Module) -> list[Routed]:
    """What the experts of a block are called with on the calibration text, batch by batch, in all processes of a run.

    Raises BillhookError where they are not called with hidden states, and the numbers and weights of each token's
    experts, as `transformers` does.
    """
    calls: list[tuple[Tensor, ...]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(args[:3])

    with ExitStack() as stack:
        stack.callback(experts.register_forward_pre_hook(note).remove)
        for states, call in zip(block.inputs, block.calls, strict=True):
            run_block(block.module, states, call)
    if not calls or any(len(args) < 3 or not isinstance(args[1], Tensor) for args in calls):
        raise BillhookError(f"{block.name}: its experts are called in an unknown way, so none can be removed.")
    device = calls[0][0].device
    return [(x.to(device), chosen.to(device), weights.to(device)) for x, chosen, weights in unshard(calls)]


def alone(experts: nn.Module, expert: int, x: Tensor, like: Tensor) -> Tensor:
    """What one expert returns for x [tokens, width], whose router weights have the dtype of `like`."""
    one = torch.full((len(x), 1), expert, dtype=torch.int64, device=x.device)
    result: Tensor = experts(x, one, torch.ones(len(x), 1, dtype=like.dtype, device=x.device))
    return result


class Restricted:
    """The forward function of a router that knows only the experts in `kept`, bool [experts], by their old numbers.

    It computes what the router of the smaller model does, and gives the experts that it chose their old numbers.
    """

    def __init__(self, router: nn.Module, forward: Callable[..., Any], kept: Tensor, tensors: Sequence[str]) -> None:
        self.router, self.forward, self.kept, self.tensors = router, forward, kept.nonzero()[:, 0], tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the router returns: logits, weights and numbers."""
        router: Any = self.router
        numbers = {"top_k": min(router.top_k, len(self.kept)), "num_experts": len(self.kept)}
        numbers = {name: number for name, number in numbers.items() if hasattr(router, name)}
        whole = {name: getattr(router, name) for name in (*self.tensors, *numbers)}
        try:
            for name in self.tensors:
                kept = whole[name].detach()[self.kept.to(whole[name].device)]
                setattr(router, name, nn.Parameter(kept, requires_grad=False) if name in router._parameters else kept)
            for name, number in numbers.items():
                setattr(router, name, number)
            logits, weights, chosen = self.forward(*args, **kwargs)
        finally:
            for name, value in whole.items():
                setattr(router, name, value)
        return logits, weights, self.kept.to(chosen.device)[chosen]


def restricted(model: PreTrainedModel, unit: Unit, kept: Tensor) -> Restricted:
    """The router of a unit that knows only the experts `kept`, bool [experts]."""
    router, _ = mixture_of(model, unit)
    name = next(n for n, module in model.named_modules() if module is router)
    tensors = [s.tensor.removeprefix(f"{name}.") for s in unit.slices if s.tensor.startswith(f"{name}.")]
    own = router.__dict__.get("forward")
    return Restricted(router, own.forward if isinstance(own, Restricted) else router.forward, kept, tensors)


def restrict_(model: PreTrainedModel, unit: Unit, kept: Tensor) -> None:
    """From now on a unit's router sends tokens only to the experts `kept`, bool [experts]."""
    mixture_of(model, unit)[0].forward = restricted(model, unit, kept)
