"""Measuring: one pass over the layers that fills the table allocators read.

Spectral metrics need the weights alone; the outlier ratio of OWL needs activations of the dense model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.arch import Layer, find_layers
from billhook.errors import BillhookError
from billhook.metrics import METRICS, needs_activations, parameter
from billhook.spectra import spectral_metrics
from billhook.table import Row, Table
from billhook.walk import Block, walk

Progress = Callable[[str], None]


def measure(
    model: PreTrainedModel,
    metrics: Sequence[str] = ("alpha_peak",),
    *,
    batches: Sequence[Tensor] = (),
    layers: Sequence[Layer] | None = None,
    facts: dict[str, Any] | None = None,
    progress: Progress = lambda layer: None,
) -> Table:
    """Measure `metrics` of every layer of a model in memory.

    `batches` are token ids [batch, length] int64, needed by the metrics that look at activations; `layers` restricts the table;
    `facts` describes the model (name, digest) and goes into the table. `progress` is called with the name of each finished layer.
    Raises BillhookError for an unknown metric, or one that needs batches when there are none.
    """
    layers = find_layers(model) if layers is None else layers
    of_activations = [name for name in metrics if needs_activations(name)]
    of_weights = [name for name in metrics if name not in of_activations]
    if of_activations and not batches:
        raise BillhookError(f"The metric {of_activations[0]} looks at activations: give text with --calibration SOURCE.")
    columns: dict[str, dict[str, float]] = {layer.name: {} for layer in layers}
    if of_activations:
        for block in walk(model, batches, ("input_norm",), dense=True):
            _block_metrics(block, layers, of_activations, columns)
    for layer in layers:
        columns[layer.name].update(spectral_metrics(layer.weight, of_weights))
        progress(layer.name)
    rows = tuple(Row(x.name, x.block, x.kind, x.shape, {m: columns[x.name][m] for m in metrics}) for x in layers)
    return Table(rows, facts or {}, {"metrics": list(metrics)})


def _block_metrics(block: Block, layers: Sequence[Layer], metrics: Sequence[str], columns: dict[str, dict[str, float]]) -> None:
    """Compute the metrics of a whole block and note them on each of its layers."""
    names = {layer.name for layer in layers}
    inside = [layer for layer in block.layers if layer.name in names]
    for name in metrics if inside else ():
        value = METRICS.get(name.partition(":")[0])(
            [layer.weight for layer in inside], [block.stats[layer.name].input_norm for layer in inside], parameter(name)
        )
        for layer in inside:
            columns[layer.name][name] = value


def outlier_ratio(weights: Sequence[Tensor], norms: Sequence[Tensor | None], m: float) -> float:
    """OWL's outlier distribution of one block (arXiv:2310.05175, equation 2), in percent.

    D = 100 * share of the block's scores |W_ij| ||X_j||_2 that exceed `m` times their mean, all layers of the block together.
    `weights` are [out, in], `norms` [in] float32; a layer that saw no tokens is left out.
    """
    scores = [w.abs().float() * norm for w, norm in zip(weights, norms, strict=True) if norm is not None]
    total = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / total
    return 100 * sum(int((score > m * mean).sum()) for score in scores) / total
