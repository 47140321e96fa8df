"""Mixtures of experts: what every expert does on the calibration text, and a router that knows only some of them."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.units import Slice, Unit, router_of
from billhook.distributed.collectives import unshard
from billhook.engine.replay import run_block
from billhook.engine.walk import Block
from billhook.errors import BillhookError
from billhook.store.files import in_one_line

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
    `slices` are those of its tensors, by their names in the router, and `biases` [experts] those of the mixture, which
    it is called with.
    """

    def __init__(
        self,
        router: nn.Module,
        forward: Callable[..., Any],
        kept: Tensor,
        slices: Sequence[Slice],
        biases: Sequence[Tensor] = (),
    ) -> None:
        self.router, self.forward, self.slices, self.biases = router, forward, slices, biases
        self.experts, self.kept = len(kept), kept.nonzero()[:, 0]

    def sends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers and weights [tokens, k] of the experts to which tokens x [tokens, width] go.

        Raises BillhookError where the router is called in another way.
        """
        try:
            _, weights, chosen = self(x, *self.biases)
        except (TypeError, ValueError, AttributeError) as error:
            who, why = type(self.router).__name__, f"it is called in an unknown way ({in_one_line(error)})"
            raise BillhookError(f"Experts behind a router {who} cannot be removed: {why}.") from None
        return chosen, weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the router returns, such as logits, weights and numbers."""
        router: Any = self.router
        numbers = {"top_k": min(router.top_k, len(self.kept)), "num_experts": len(self.kept)}
        changes: list[tuple[nn.Module, str, Any]] = [(router, *x) for x in numbers.items() if hasattr(router, x[0])]
        for s in self.slices:
            owner, _, name = s.tensor.rpartition(".")
            value = getattr(module := router.get_submodule(owner), name)
            kept = value.detach().index_select(s.dim, self.kept.to(value.device))
            kept = nn.Parameter(kept, requires_grad=False) if name in module._parameters else kept
            changes.append((module, name, kept))
        whole = [(module, name, getattr(module, name)) for module, name, _ in changes]
        try:
            for change in changes:
                setattr(*change)
            results = self.forward(*map(self._cut, args), **{key: self._cut(value) for key, value in kwargs.items()})
        finally:
            for change in whole:
                setattr(*change)
        return tuple(self.kept.to(x.device)[x] if x.dtype == torch.int64 else x for x in results)

    def _cut(self, value: Any) -> Any:
        """An argument, of which a vector [experts] has the entries that are kept."""
        if isinstance(value, Tensor) and value.shape == (self.experts,):
            return value[self.kept.to(value.device)]
        return value


def restricted(model: PreTrainedModel, unit: Unit, kept: Tensor) -> Restricted:
    """The router of a unit that knows only the experts `kept`, bool [experts]."""
    router, _ = mixture_of(model, unit)
    name = next(n for n, module in model.named_modules() if module is router)
    inside = [s for s in unit.slices if s.tensor.startswith(f"{name}.")]
    slices = [replace(s, tensor=s.tensor.removeprefix(f"{name}.")) for s in inside]
    mixture = unit.name.rpartition(":")[0]
    direct = [s.tensor for s in unit.slices if s.tensor.rpartition(".")[0] == mixture]
    biases = [getattr(model.get_submodule(mixture), tensor.rpartition(".")[2]) for tensor in direct]
    own = router.__dict__.get("forward")
    return Restricted(router, own.forward if isinstance(own, Restricted) else router.forward, kept, slices, biases)


def restrict_(model: PreTrainedModel, unit: Unit, kept: Tensor) -> None:
    """From now on a unit's router sends tokens only to the experts `kept`, bool [experts]."""
    mixture_of(model, unit)[0].forward = restricted(model, unit, kept)


def unrestrict_(model: PreTrainedModel, units: Iterable[Unit]) -> None:
    """Let the routers of units know all experts again."""
    for unit in units:
        if unit.kind == "experts":
            mixture_of(model, unit)[0].__dict__.pop("forward", None)
