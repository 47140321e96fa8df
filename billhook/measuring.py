"""Measuring: one pass over the layers that fills the table allocators read.

Spectral metrics need the weights alone; the outlier ratio of OWL needs activations of the dense model.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.arch import Layer, find_layers
from billhook.errors import BillhookError
from billhook.metrics import fact
from billhook.outliers import outlier_ratio, parse_m
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
    columns = {name if fact(name).spectral else f"outlier_ratio:{parse_m(name):g}": name for name in metrics}
    of_weights = [name for name in columns if fact(name).spectral]
    of_activations = [name for name in columns if not fact(name).spectral]
    if of_activations and not batches:
        raise BillhookError(f"The metric {of_activations[0]} looks at activations: give text with --calibration SOURCE.")
    values: dict[str, dict[str, float]] = {layer.name: {} for layer in layers}
    if of_activations:
        for block in walk(model, batches, ("input_norm",), dense=True):
            _outliers(block, of_activations, values)
    for layer in layers:
        values[layer.name].update(spectral_metrics(layer.weight, of_weights) if of_weights else {})
        progress(layer.name)
    rows = tuple(Row(x.name, x.block, x.kind, x.shape, {m: values[x.name][m] for m in columns}) for x in layers)
    return Table(rows, facts or {}, {"metrics": list(columns)})


def _outliers(block: Block, columns: Sequence[str], values: dict[str, dict[str, float]]) -> None:
    """Compute the outlier ratios of a whole block and note them on each of its measured layers."""
    layers = [layer for layer in block.layers if layer.name in values]
    norms = [block.stats[layer.name].input_norm for layer in layers]
    for name in columns if layers else ():
        ratio = outlier_ratio([layer.weight for layer in layers], norms, parse_m(name))
        for layer in layers:
            values[layer.name][name] = ratio
