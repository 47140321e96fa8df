"""What the choice of storage types is made from: the errors of all tensors at all types, and what an error costs.

Everything is measured with one block at a time in memory, on some of the calibration windows:

* of the layers the relative error at every type (`billhook.measurement.level_errors`) and its cost, the KL divergence
  of the model per relative error:  c_l = ½ f_l · mean ‖W x‖²  (`billhook.measurement.fisher`);
* of embeddings and head the divergence at the smallest type, times the error of every other type relative to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.engine.batch import Batch, main_input, rows_of, select_rows, split_rows
from billhook.engine.walk import Progress
from billhook.evaluation.quality import Reference
from billhook.measurement.fisher import fisher
from billhook.measurement.level_errors import level_errors
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.nearest import nearest
from billhook.methods.statistics import LayerStats
from billhook.plan.storage import bits
from billhook.steps.request import Opened
from billhook.steps.sizes import outside_menu
from billhook.steps.types import outside_parameter

ERROR_TOKENS = (
    16384  # of calibration text on which errors are measured, and twice as many as the widest layer has inputs
)
COST_TOKENS = 4096
_ROWS = 1024  # of embeddings and head whose errors are measured
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
    outside: Mapping[str, tuple[int, int]],
    scale_dtype: torch.dtype,
    seed: int,
    progress: Progress = lambda line: None,
) -> Measured:
    """Measure the layers of `menus`, and embeddings and head by their names on disk and shapes."""
    model, layers, resources = opened.model, opened.layers, opened.resources
    widest = max(layer.shape[1] for layer in layers)
    several = _windows(opened, max(ERROR_TOKENS, 2 * widest))
    found = level_errors(model, layers, several, menus, scale_dtype, resources=resources, progress=progress)
    few = _windows(opened, COST_TOKENS)
    information = fisher(model, layers, few, opened.task, seed=seed, resources=resources, progress=progress)
    costs = {name: max(0.5 * f * found.power[name], _LEAST) for name, f in information.items()}
    return Measured(found.errors, costs, _outside_losses(opened, outside, few, progress))


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
    opened: Opened, shapes: Mapping[str, tuple[int, int]], batches: list[Batch], progress: Progress
) -> dict[str, dict[str, float]]:
    """The divergence of the model in which embeddings or head alone have a type, by name and type."""
    losses: dict[str, dict[str, float]] = {}
    if not shapes:
        return losses
    model, resources = opened.model, opened.resources
    batch = {name: torch.cat([part[name] for part in batches]) for name in batches[0]}
    reference = Reference.of(model, batch, opened.task, "calibration windows", resources=resources)
    for name, (_, columns) in shapes.items():
        parameter, menu = outside_parameter(model, name), outside_menu(columns)
        smallest = min(menu, key=lambda t: (bits(t), t))
        own = parameter.clone()
        errors = {type: _error(own[:: max(1, len(own) // _ROWS)].float(), type) for type in menu}
        parameter.copy_(_rounded(own.float(), smallest))
        kl = max(reference.compare(model, resources).kl or 0.0, _LEAST)
        parameter.copy_(own)
        losses[name] = {type: kl * errors[type] / errors[smallest] for type in menu}
        progress(f"{name} as {smallest}: kl {kl:.5f}")
    return losses


def _rounded(W: Tensor, type: str) -> Tensor:
    return nearest(W, LayerStats(0, 0), grid_of(type)).decode(torch.float32)


def _error(W: Tensor, type: str) -> float:
    return max(float((_rounded(W, type) - W).square().sum(dtype=torch.float64)), _LEAST)
