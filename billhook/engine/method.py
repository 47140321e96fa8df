"""What is done to each weight: a criterion that prunes or a quantizer, with all its options."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.encoded import Encoded, Masked, count_zeros
from billhook.methods.masks import Select
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.grids import grid_of
from billhook.methods.sparse import CRITERIA
from billhook.methods.sparse.magnitude import magnitude
from billhook.methods.statistics import GRADIENTS, STATISTICS, LayerStats
from billhook.plan.plan import Plan
from billhook.plan.spec import Spec

Group = Literal["row", "layer"]
Rounding = Literal["exact", "floor"]
Prefix = Literal["pruned", "dense"]


class WeightMethod(Protocol):
    """What is done to each weight of a plan."""

    @property
    def name(self) -> str:
        """The name of the criterion or quantizer."""
        ...

    @property
    def prefix(self) -> Prefix:
        """Whose outputs are the inputs of the next block: the pruned block's or the dense one's."""
        ...

    @property
    def observed(self) -> tuple[str, ...]:
        """The statistics of a layer's inputs that it reads."""
        ...

    @property
    def gradient(self) -> str:
        """The statistic of gradients that it reads, or an empty string."""
        ...

    def check(self, plan: Plan) -> None:
        """Raise BillhookError for a plan that it cannot carry out."""
        ...

    def encode(self, weight: Tensor, stats: LayerStats, spec: Spec, zeros: int) -> Encoded:
        """The encoded weight for `weight` [out, in] of any float dtype, which is not changed.

        `zeros` is the number of zeros that the plan asks for.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A criterion with all its options; `group` overrides its comparison group, `rounding` the counting of zeros.

    `prefix` says whose outputs are the inputs of the next block: `pruned` as in the published code for language models,
    `dense` as in that for vision models.
    """

    criterion: str
    options: Mapping[str, Any]
    group: Group | None = None
    rounding: Rounding = "exact"
    prefix: Prefix = "pruned"

    @property
    def name(self) -> str:
        """The name of the criterion."""
        return self.criterion

    @property
    def needs(self) -> tuple[str, ...]:
        """All statistics that the criterion reads."""
        return CRITERIA.needs(self.criterion, self.options)

    @property
    def observed(self) -> tuple[str, ...]:
        """The statistics of a layer's inputs that the criterion reads."""
        return tuple(name for name in self.needs if name in STATISTICS)

    @property
    def gradient(self) -> str:
        """The statistic of gradients that the criterion reads, or an empty string."""
        return next((name for name in self.needs if name in GRADIENTS), "")

    def check(self, plan: Plan) -> None:
        """Raise BillhookError unless the plan has only sparsities."""
        plan.check_sparsities()

    def encode(self, weight: Tensor, stats: LayerStats, spec: Spec, zeros: int) -> Masked:
        """The pruned weight; by magnitude where there are no statistics of the layer, which is noted."""
        out, columns = weight.shape
        group = self.group or CRITERIA.group(self.criterion)
        select = Select((out, columns), spec.sparsity, zeros, spec.keep_of, group, self.rounding)
        before = count_zeros(weight)
        if select.sparsity == 0:
            return Masked(weight, select, before)
        criterion = partial(CRITERIA.get(self.criterion), **self.options)
        if unseen := self._unseen(stats):
            stats.note(f"{unseen}: pruned by magnitude")
            criterion, stats = partial(magnitude), LayerStats(0, 0)
        return Masked(criterion(weight.float(), stats, select), select, before)

    def _unseen(self, stats: LayerStats) -> str | None:
        """Why there are no statistics of a layer (an expert that received no token), or None."""
        if self.observed:
            return "received no calibration token" if stats.tokens == 0 else None
        return "has no gradient" if stats.gradient is not None and not stats.gradient.any() else None


@dataclass(frozen=True)
class Quantization:
    """A quantizer with all its options; scales of scalar types are stored in `scale_dtype`."""

    quantizer: str
    options: Mapping[str, Any]
    scale_dtype: torch.dtype = torch.float16
    gradient = ""
    prefix: Prefix = "pruned"

    @property
    def name(self) -> str:
        """The name of the quantizer."""
        return self.quantizer

    @property
    def observed(self) -> tuple[str, ...]:
        """The statistics of a layer's inputs that the quantizer reads."""
        return QUANTIZERS.needs(self.quantizer, self.options)

    def check(self, plan: Plan) -> None:
        """Raise BillhookError unless the plan has only storage types to which weights can be quantized."""
        if not plan.weights:
            raise BillhookError("The plan has no storage types: billhook quantize applies them.")
        for name, spec in plan.weights.items():
            if spec.type is None:
                raise BillhookError(f"The plan has a sparsity for {name}: billhook quantize applies storage types.")
            grid_of(spec.type)

    def encode(self, weight: Tensor, stats: LayerStats, spec: Spec, zeros: int) -> Encoded:
        """The quantized weight; rounded to nearest where there are no statistics of the layer, which is noted."""
        assert spec.type is not None
        grid = grid_of(spec.type, self.scale_dtype)
        if self.observed and stats.tokens == 0:
            stats.note("received no calibration token: rounded to nearest")
            made: Encoded = QUANTIZERS.get("round")(weight.float(), LayerStats(0, 0), grid)
        else:
            made = QUANTIZERS.get(self.quantizer)(weight.float(), stats, grid, **self.options)
        return made
