"""Mixtures of experts: what every expert does on the calibration text, and a router that knows only some of them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.units import Unit, router_of
from billhook.engine.replay import run_block
from billhook.engine.walk import Block
from billhook.errors import BillhookError
from billhook.methods.structured.experts import ExpertStats


def mixture_of(model: PreTrainedModel, unit: Unit) -> tuple[nn.Module, nn.Module]:
    """The router and the experts of a unit."""
    module = model.get_submodule(unit.name.rpartition(":")[0])
    found = router_of(module)
    assert found is not None
    return found[1], module.get_submodule("experts")


@torch.no_grad()
def expert_stats(block: Block, experts: nn.Module, count: int) -> ExpertStats:
    """Run a block on its inputs, and every expert on the tokens that it receives.

    `experts` is called with hidden states [tokens, width], and the numbers and weights of each token's experts [tokens,
    k], as `transformers` does; raises BillhookError where it is not.
    """
    tokens, effect = torch.zeros(count), torch.zeros(count)
    calls: list[tuple[Tensor, ...]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(args[:3])

    with ExitStack() as stack:
        stack.callback(experts.register_forward_pre_hook(note).remove)
        for states, call in zip(block.inputs, block.calls, strict=True):
            run_block(block.module, states, call)
    if not calls or any(len(args) < 3 or not isinstance(args[1], Tensor) for args in calls):
        raise BillhookError(f"{block.name}: its experts are called in an unknown way, so none can be removed.")
    for x, chosen, weights in calls:
        for expert in chosen.unique().tolist():
            at, place = (chosen == expert).nonzero(as_tuple=True)
            one = torch.full((len(at), 1), expert, dtype=chosen.dtype, device=chosen.device)
            output = experts(x[at], one, torch.ones(len(at), 1, dtype=weights.dtype, device=weights.device))
            tokens[expert] += len(at)
            effect[expert] += float((weights[at, place].float() * output.float().norm(dim=1)).sum())
    return ExpertStats(tokens, effect)


class Restricted:
    """The forward function of a router that knows only the experts in `kept`, bool [experts], by their old numbers.

    It computes what the router of the smaller model does, and gives the experts that it chose their old numbers.
    """

    def __init__(self, router: nn.Module, forward: Callable[..., Any], kept: Tensor, tensors: Sequence[str]) -> None:
        self.router, self.forward, self.kept, self.tensors = router, forward, kept.nonzero()[:, 0], tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the router returns: logits, weights and numbers."""
        router: Any = self.router
        whole = {name: getattr(router, name) for name in self.tensors}
        top = router.top_k
        try:
            for name, value in whole.items():
                kept = value.detach()[self.kept.to(value.device)]
                setattr(router, name, nn.Parameter(kept, requires_grad=False) if name in router._parameters else kept)
            router.top_k = min(top, len(self.kept))
            logits, weights, chosen = self.forward(*args, **kwargs)
        finally:
            for name, value in whole.items():
                setattr(router, name, value)
            router.top_k = top
        return logits, weights, self.kept.to(chosen.device)[chosen]


def restrict_(model: PreTrainedModel, unit: Unit, kept: Tensor) -> None:
    """From now on a unit's router sends tokens only to the experts `kept`, bool [experts]."""
    router, _ = mixture_of(model, unit)
    name = next(n for n, module in model.named_modules() if module is router)
    tensors = [s.tensor.removeprefix(f"{name}.") for s in unit.slices if s.tensor.startswith(f"{name}.")]
    router.__dict__.pop("forward", None)
    router.forward = Restricted(router, router.forward, kept, tensors)
