"""Measuring: one pass over the layers that fills the table allocators read.

Spectral metrics need the weights alone; the outlier ratio of OWL needs activations of the dense model.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.arch import Layer, find_layers
from billhook.data import as_batches
from billhook.errors import BillhookError
from billhook.metrics import fact
from billhook.outliers import outlier_ratio, parse_m
from billhook.perplexity import vocabulary_size
from billhook.spectra import measure_spectra
from billhook.table import Row, Table
from billhook.walk import Block, walk

Progress = Callable[[str], None]


def metric_names(metrics: str | Sequence[str]) -> list[str]:
    """The metrics that were asked for, from a list (none is fine) or one text with commas; raises BillhookError for an empty text."""
    names = [name.strip() for name in (metrics.split(",") if isinstance(metrics, str) else metrics) if name.strip()]
    if isinstance(metrics, str) and not names:
        raise BillhookError("No metric was named: give one, such as alpha_peak (billhook ls metrics lists them).")
    return names


def measure(
    model: PreTrainedModel,
    metrics: str | Sequence[str] = ("alpha_peak",),
    *,
    batches: Tensor | Sequence[Tensor] = (),
    layers: Sequence[Layer] | None = None,
    facts: dict[str, Any] | None = None,
    progress: Progress = lambda layer: None,
) -> Table:
    """Measure `metrics` (names, or one text with commas) of every layer of a model in memory.

    `batches` are token ids [batch, length] int64 (one tensor: one batch), needed by the metrics that look at activations;
    `layers` restricts the table; `facts` describes the model (name, digest) and goes into the table. `progress` is called with the
    name of each finished layer. Raises BillhookError for an unknown metric, one that needs batches when there are none, or
    no metric at all.
    """
    layers = find_layers(model) if layers is None else layers
    columns = {name if fact(name).spectral else f"outlier_ratio:{parse_m(name):g}": name for name in metric_names(metrics)}
    of_weights = [name for name in columns if fact(name).spectral]
    of_activations = [name for name in columns if not fact(name).spectral]
    batches = as_batches(batches, vocabulary_size(model)) if of_activations else []
    if of_activations and not batches:
        raise BillhookError(f"The metric {of_activations[0]} looks at activations: give text with --calibration SOURCE.")
    values: dict[str, dict[str, float]] = {layer.name: {} for layer in layers}
    if of_activations:
        for block in walk(model, batches, ("input_norm",), dense=True):
            _outliers(block, of_activations, values)
    if of_weights:
        for name, found in measure_spectra(layers, of_weights, progress).items():
            values[name].update(found)
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
