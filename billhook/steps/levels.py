"""What the choice of storage types is made from: the errors of all tensors at all types, and what an error costs.

Everything is measured with one block at a time in memory, on some of the calibration windows:

* of the layers the relative error at every type (`billhook.measurement.level_errors`) and its cost, the KL divergence
  of the model per relative error:  c_l = ½ f_l · mean ‖W x‖²  (`billhook.measurement.fisher`);
* of the experts of one kind in a block, which share a type, at most `EXPERTS`, whose means stand for the others;
* of embeddings and head the divergence at the smallest types, up to the first with one below `_PROPORTIONAL`, and for
  larger types that one times their error relative to its: a model that has lost its words says nothing about them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from billhook.architectures.layers import Layer
from billhook.engine.batch import Batch, main_input, rows_of, select_rows, split_rows
from billhook.engine.walk import Progress
from billhook.evaluation.quality import Reference
from billhook.measurement.fisher import fisher
from billhook.measurement.level_errors import LevelErrors, level_errors
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.nearest import nearest
from billhook.methods.statistics import LayerStats
from billhook.plan.storage import bits
from billhook.steps.request import Opened
from billhook.steps.saved_levels import SavedLevels
from billhook.steps.types import outside_parameter

ERROR_TOKENS = 16384  # of text for the errors; at least twice as many as the widest layer has inputs
COST_TOKENS = 4096  # of text for the costs
OUTSIDE_TOKENS = 1024  # of text for embeddings and head, each type of which costs a pass through the whole model
EXPERTS = 8
_ROWS = 1024  # of embeddings and head whose errors are measured, and that are rounded at a time
_PROPORTIONAL = 0.1  # nats a token: divergences up to about which they grow like the error
_NOT_FINITE = 100.0  # stands for a divergence that is not finite
_LEAST = 1e-9  # of a cost, a divergence or an error


@dataclass(frozen=True)
class Measured:
    """`errors` of the layers by name and type, their `costs`, and the `losses` of embeddings and head by type."""

    errors: Mapping[str, Mapping[str, float]]
    costs: Mapping[str, float]
    losses: Mapping[str, Mapping[str, float]]


def measure_levels(
    opened: Opened,
    menus: Mapping[str, list[str]],
    outside: Mapping[str, list[str]],
    scale_dtype: torch.dtype,
    kept: SavedLevels,
    *,
    seed: int = 0,
    progress: Progress = lambda line: None,
) -> Measured:
    """Measure the layers of `menus`, and embeddings and head, with the menus `outside` by their names on disk.

    What is `kept` already is not measured again.
    """
    model, resources = opened.model, opened.resources
    stand_ins = _stand_ins(opened.layers)
    layers = measured_layers(opened.layers)
    widest = max(layer.shape[1] for layer in layers)
    several = _windows(opened, max(ERROR_TOKENS, 2 * widest))
    found = LevelErrors(kept.found.errors, kept.found.power)
    if found.errors.keys() != {layer.name for layer in layers}:
        found = level_errors(
            model, layers, several, menus, scale_dtype, known=found,
            measured=lambda found: kept.keep(errors=found.errors, power=found.power),
            resources=resources, progress=progress,
        )  # fmt: skip
    few = _windows(opened, COST_TOKENS)
    information = kept.found.information
    if not information:
        information = fisher(model, layers, few, opened.task, seed=seed, resources=resources, progress=progress)
        kept.keep(information=information)
    costs = {name: max(0.5 * f * found.power[name], _LEAST) for name, f in information.items()}
    everywhere = {name: fmean(costs[x] for x in some) for name, some in stand_ins.items()}
    errors = {n: {t: fmean(found.errors[x][t] for x in some) for t in menus[n]} for n, some in stand_ins.items()}
    shortest = _windows(opened, OUTSIDE_TOKENS)
    return Measured(errors, everywhere, _outside_losses(opened, outside, shortest, kept, progress))


def measured_layers(layers: Sequence[Layer]) -> list[Layer]:
    """The layers whose errors and costs are measured: all but some experts."""
    names = {name for some in _stand_ins(layers).values() for name in some}
    return [layer for layer in layers if layer.name in names]


def _stand_ins(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """The layers that are measured for each layer: itself, or for an expert some of its kind, spread evenly."""
    kinds: dict[tuple[int, str], list[str]] = {}
    for layer in layers:
        if layer.expert is not None:
            kinds.setdefault((layer.block, layer.kind), []).append(layer.name)
    chosen = {kind: names[:: -(-len(names) // EXPERTS)] for kind, names in kinds.items()}
    return {x.name: [x.name] if x.expert is None else chosen[x.block, x.kind] for x in layers}


def _windows(opened: Opened, tokens: int) -> list[Batch]:
    """At least so many tokens of the calibration text, in windows spread evenly over it."""
    assert opened.samples is not None
    whole = opened.samples.batch
    rows, length = main_input(opened.model, whole).shape[:2]
    count = min(rows, max(1, -(-tokens // length)))
    index = torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long()
    return split_rows(select_rows(whole, index), rows_of(opened.batches[0]))


@torch.no_grad()
def _outside_losses(
    opened: Opened, menus: Mapping[str, list[str]], batches: list[Batch], kept: SavedLevels, progress: Progress
) -> dict[str, dict[str, float]]:
    """The divergence of the model in which embeddings or head alone have a type, by name and type."""
    losses = dict(kept.found.losses)
    if menus.keys() <= losses.keys():
        return losses
    model, resources = opened.model, opened.resources
    batch = {name: torch.cat([part[name] for part in batches]) for name in batches[0]}
    reference = Reference.of(model, batch, opened.task, "calibration windows", resources=resources)
    for name, menu in menus.items():
        parameter = outside_parameter(model, name)
        own, found = parameter.clone(), dict[str, float]()
        errors = {type: _error(own[:: max(1, len(own) // _ROWS)].float(), type) for type in menu}
        for type in sorted(menu, key=lambda t: (bits(t), t)):
            for new, old in zip(parameter.split(_ROWS), own.split(_ROWS), strict=True):
                new.copy_(_rounded(old.float(), type))
            kl = reference.compare(model, resources).divergence
            found[type] = _NOT_FINITE if kl is None else max(kl, _LEAST)
            parameter.copy_(own)
            if found[type] < _PROPORTIONAL:
                break
        losses[name] = {t: found.get(t, found[type] * errors[t] / errors[type]) for t in menu}
        kept.keep(losses=losses)
        progress(f"{name} as {type}: kl {found[type]:.5f}")
    return losses


def _rounded(W: Tensor, type: str) -> Tensor:
    return nearest(W, LayerStats(0, 0), grid_of(type)).decode(torch.float32)


def _error(W: Tensor, type: str) -> float:
    return max(float((_rounded(W, type) - W).square().sum(dtype=torch.float64)), _LEAST)
