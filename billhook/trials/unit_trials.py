"""Trials of plans of units: parts are removed in full by one plan after another, as `billhook slim` does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.architectures.units import Unit
from billhook.distributed.collectives import gather
from billhook.engine.batch import Batch, rows_of
from billhook.engine.experts import down_projections
from billhook.engine.loop import LayerResult
from billhook.engine.removal import Dropped, Removal, changed_layers, choose_parts, dropping, remove_parts_
from billhook.engine.routing import mixture_of, unrestrict_
from billhook.engine.walk import Block
from billhook.methods.statistics import LayerStats
from billhook.plan.plan import Plan
from billhook.trials.attribution import FLOOR
from billhook.trials.trials import Runner

ALONE = 8  # held-out windows on which each unit is tried alone


class UnitRunner(Runner):
    """Removes parts of `units` from a model in memory, without the blocks numbered `gone`."""

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        batches: Sequence[Batch],
        heldout: Batch,
        removal: Removal,
        *,
        experts: str = "obs",
        gone: Sequence[int] = (),
    ) -> None:
        """`removal` is how parts are removed, `experts` how experts are chosen; the others as of `Runner`."""
        if any(unit.kind == "experts" for unit in units):
            removal = removal.without_target()
        super().__init__(model, changed_layers(model, units), batches, heldout, removal.gradient)
        self.units, self.removal, self.experts, self.gone = list(units), removal, experts, list(gone)
        self._routers = {u.name: mixture_of(model, u)[0] for u in units if u.kind == "experts"}
        self._dropped: Mapping[int, Dropped] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        self._dropped = self._stack.enter_context(dropping(self.model, self.gone))
        self._stack.callback(unrestrict_, self.model, self.units)
        return self

    def restore_(self) -> None:
        """Put the dense weights back, and let routers know all experts."""
        super().restore_()
        unrestrict_(self.model, self.units)

    @torch.no_grad()
    def prune(self, plan: Plan) -> list[LayerResult]:
        """Remove parts from the dense model in place, so that those of the plan stay."""
        self.restore_()
        return remove_parts_(
            self.model, self.units, gather(plan)[0].units, self.removal, self.batches,
            experts=self.experts, dropped=self._dropped, gradients=self.dense_gradients,
        )  # fmt: skip

    def choose_parts(self, unit: Unit, count: int, block: Block) -> tuple[Tensor, Tensor, float | None]:
        """What `billhook.engine.removal.choose_parts` returns for a unit that alone becomes smaller in the dense model,
        with the statistics of its block."""
        assert unit.consumer is not None
        name = unit.consumer.name
        stats = replace(block.stats.get(name, LayerStats(0, 0)), notes=[])
        gradient = None if self.dense_gradients is None else self.dense_gradients[name]
        return choose_parts(unit, count, self.removal.without_target(), stats, gradient)

    def attribute(self) -> dict[str, float]:
        """Each unit's share of the divergence of the model as it is now.

        With experts, a share is the divergence of the model in which only that unit is as it is now, because what
        removed experts cost is no sum over weights.
        """
        if self._routers:
            return self._alone()
        shares = super().attribute()
        return {unit.name: shares[unit.consumer.name] for unit in self.units if unit.consumer is not None}

    @torch.no_grad()
    def _alone(self) -> dict[str, float]:
        weights = {layer.name: layer.weight.clone() for layer in self.layers}
        forwards = {name: router.__dict__.get("forward") for name, router in self._routers.items()}
        shares = {}
        for unit in self.units:
            self.restore_()
            for layer in self._layers_of(unit):
                layer.weight.copy_(weights[layer.name])
            if (forward := forwards.get(unit.name)) is not None:
                self._routers[unit.name].forward = forward
            kl = self.losses(0, min(ALONE, rows_of(self.heldout))).kl
            shares[unit.name] = sum(kl) / len(kl)
        least = max(FLOOR * sum(shares.values()) / len(shares), 1e-12)
        return {name: max(share, least) for name, share in shares.items()}

    def _layers_of(self, unit: Unit) -> list[Layer]:
        return down_projections(self.model, unit) if unit.consumer is None else [unit.consumer]
