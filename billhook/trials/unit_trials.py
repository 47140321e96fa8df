"""Trials of plans of units: parts are removed in full by one plan after another, as `billhook slim` does."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from billhook.architectures.units import Unit
from billhook.distributed.collectives import gather
from billhook.engine.batch import Batch
from billhook.engine.loop import LayerResult
from billhook.engine.removal import Dropped, Removal, dropping, remove_parts_
from billhook.plan.plan import Plan
from billhook.trials.trials import Runner


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
        gone: Sequence[int] = (),
    ) -> None:
        """`removal` is how parts are removed; the others as of `Runner`. Every unit has a consumer."""
        layers = [unit.consumer for unit in units if unit.consumer is not None]
        super().__init__(model, layers, batches, heldout, removal.gradient)
        self.units, self.removal, self.gone = list(units), removal, list(gone)
        self._dropped: Mapping[int, Dropped] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        self._dropped = self._stack.enter_context(dropping(self.model, self.gone))
        return self

    @torch.no_grad()
    def prune(self, plan: Plan) -> list[LayerResult]:
        """Remove parts from the dense model in place, so that those of the plan stay."""
        self.restore_()
        options: dict[str, Any] = {"dropped": self._dropped, "gradients": self.dense_gradients}
        return remove_parts_(self.model, self.units, gather(plan)[0].units, self.removal, self.batches, **options)

    def attribute(self) -> dict[str, float]:
        """Each unit's share of the divergence of the model as it is now."""
        shares = super().attribute()
        return {unit.name: shares[unit.consumer.name] for unit in self.units if unit.consumer is not None}
