"""Error curves: the relative error of each layer's output at every sparsity, with the criterion that will prune it.

    e_l(s) = ‖(W − W'(s)) X‖² / ‖W X‖²   for s = 0, 1/40, …, 1

The layer is pruned alone and sees the dense model's inputs X. The criterion runs on 16 of its rows at the sparsities
0.3, 0.5, 0.7 and 0.9, stacked, so that the input statistics are factorized once. Between these, ln e is linear in s;
e(0) = 0 and e(1) = 1. `error_curve:CRITERION` is read by `curves`, and `billhook plot` draws it.

Cost: one pass of the text through the dense model with its statistics, and the criterion on 64 rows per layer. Plans
from 16, 32 and all rows were equally good. Rows are compared as in the criterion's own group, among those sampled.

Limits: it does not say what a layer's error costs the model, see `loss_share`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.batch import Batch
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import walk
from billhook.errors import BillhookError, JobError
from billhook.methods.masks import Select
from billhook.methods.sparse import CRITERIA
from billhook.methods.sparse.admm import default_steps
from billhook.methods.sparse.magnitude import magnitude
from billhook.methods.statistics import STATISTICS, LayerStats
from billhook.plan.metrics import fact
from billhook.registry import method

TRIED = (0.3, 0.5, 0.7, 0.9)
ROWS = 16
STEPS = 40
FEW = 3  # alternations of admm
_LEAST = 1e-9


@method(paper=fact("error_curve").paper)
@torch.no_grad()
def error_curve(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    resources: Resources = IN_MEMORY,
    *,
    criterion: str = "admm",
) -> dict[str, list[float]]:
    """Return e at 0, 1/40, ..., 1 by layer name; raises BillhookError for an unknown criterion or one of gradients."""
    options = CRITERIA.configure(criterion, cheaper(criterion, layers))
    needs = CRITERIA.needs(criterion, options)
    if not set(needs) <= set(STATISTICS):
        raise BillhookError(
            f"error_curve:{criterion} would need gradients: use another criterion, such as admm or wanda."
        )
    curves = {}
    statistics = tuple(dict.fromkeys((*needs, "input_norm")))
    for block in walk(model, batches, statistics, layers=layers, read_only=True, resources=resources):
        for layer in block.layers:
            errors = _errors(layer, block.stats_of(layer), criterion, options)
            curves[layer.name] = curve_through(TRIED, errors)
    return curves


def cheaper(criterion: str, layers: Sequence[Layer]) -> dict[str, object]:
    """Return options that make a trial cheaper than a run: at most three steps of admm."""
    few = criterion == "admm" and default_steps(max(layer.shape[1] for layer in layers)) > FEW
    return {"steps": FEW} if few else {}


@dataclass(frozen=True)
class _Stacked(Select):
    """One stack of rows for each of `TRIED`, selected separately; `sparsity` scales that of every stack."""

    def __call__(self, score: Tensor, start: int = 0) -> Tensor:
        """Select in each stack."""
        rows = self.shape[0] // len(TRIED)
        part = (rows, self.shape[1])
        shares = [s * self.sparsity for s in TRIED]
        selects = [Select(part, s, round(s * rows * self.shape[1]), None, self.group) for s in shares]
        return torch.cat([select(stack, start) for select, stack in zip(selects, score.split(rows), strict=True)])


def _errors(layer: Layer, stats: LayerStats, criterion: str, options: dict[str, object]) -> list[float]:
    """The relative squared error of the layer's output at the sparsities tried."""
    W = layer.weight
    rows = torch.linspace(0, len(W) - 1, min(ROWS, len(W)), dtype=torch.float64).round().long()  # spread evenly
    W = W[rows.to(W.device)].float()
    stacked = W.repeat(len(TRIED), 1)
    unseen = stats.tokens == 0
    function = magnitude if unseen else CRITERIA.get(criterion)
    select = _Stacked(tuple(stacked.shape), 1.0, stacked.numel(), None, CRITERIA.group(criterion))  # type: ignore[arg-type]
    V = function(stacked, replace(stats, notes=[]), select, **({} if unseen else options))
    whole = max(_energy(W, stats), 1e-30)
    return [min(max(finite(_energy(W - part, stats) / whole, layer), _LEAST), 1.0) for part in V.split(len(W))]


def finite(value: float, layer: Layer) -> float:
    """The value, which is measured on a layer's outputs; raises JobError, naming the layer, for NaN and infinity."""
    if not math.isfinite(value):
        raise JobError(
            f"The outputs of {layer.name} are too large to measure errors of (NaN or infinity): check its weights and "
            "inputs, or leave it out with --ignore."
        )
    return value


def _energy(W: Tensor, stats: LayerStats) -> float:
    """The summed squares of the layer's outputs; inputs are taken as uncorrelated where only their norms are known."""
    if stats.gram is not None:
        return float(((W @ stats.gram) * W).sum(dtype=torch.float64))
    if stats.input_norm is not None and stats.tokens:
        W = W * stats.input_norm
    return float(W.square().sum(dtype=torch.float64))


def curve_through(tried: Sequence[float], errors: Sequence[float]) -> list[float]:
    """The non-decreasing error at even steps, interpolated from the errors at the fractions `tried`."""
    points = [*zip(tried, map(math.log, errors), strict=True), (1.0, 0.0)]
    curve = [0.0]
    for k in range(1, STEPS + 1):
        s = k / STEPS
        i = min(max(sum(s > x for x, _ in points) - 1, 0), len(points) - 2)
        (a, x), (b, y) = points[i], points[i + 1]
        curve.append(max(curve[-1], math.exp(x + (y - x) * (s - a) / (b - a))))
    return curve
