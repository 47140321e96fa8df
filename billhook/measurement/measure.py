"""Fill the table that allocators read: metrics of the weights, of the dense model's activations, or of its loss."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.ambient import pinned
from billhook.architectures.layers import Layer, find_layers
from billhook.distributed.collectives import gather, shard
from billhook.engine.batch import Batch, as_batches
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Block, Progress, walk
from billhook.errors import BillhookError
from billhook.measurement import canonical, function_of, options_of
from billhook.measurement.weights import measure_spectra
from billhook.plan.metrics import CURVES, companions, fact
from billhook.plan.table import Row, Table

Values = dict[str, dict[str, Any]]


@pinned
def measure(
    model: PreTrainedModel,
    metrics: str | Sequence[str] = ("alpha_peak",),
    *,
    batches: Tensor | Batch | Sequence[Tensor | Batch] = (),
    layers: Sequence[Layer] | None = None,
    facts: dict[str, Any] | None = None,
    resources: Resources = IN_MEMORY,
    progress: Progress = lambda layer: None,
) -> Table:
    """Measure `metrics` (and curves) of every layer, with the KS distance of the fit for each exponent.

    `batches` are token ids int64 [windows, length] or mappings of keyword arguments, for metrics that read activations
    or the loss; `layers` restricts the table; `facts` describes the model (name, digest) in the table. `progress` is
    called with the name of each finished layer. Raises BillhookError for an unknown metric, or missing batches.
    """
    layers = find_layers(model) if layers is None else layers
    requested = [canonical(name) for name in ([metrics] if isinstance(metrics, str) else metrics)]
    columns = list(dict.fromkeys(column for name in requested for column in (name, *companions(name))))
    reads = {name: fact(name).reads for name in columns}
    on_samples = [name for name in columns if fact(name).needs_text]
    checked = as_batches(model, batches) if on_samples else []
    if on_samples and not checked:
        kind = "activations" if reads[on_samples[0]] == "activations" else "the loss"
        raise BillhookError(f"The metric {on_samples[0]} looks at {kind}: give text with --calibration SOURCE.")
    values: Values = {layer.name: {} for layer in layers}
    on_inputs = [name for name in columns if reads[name] == "activations"]
    blocks = walk(model, checked, ("input_norm",), layers=layers, read_only=True, resources=resources)
    for block in blocks if on_inputs else ():
        for name in _measure_inputs(block, on_inputs, values):
            progress(name)
    for name in on_samples:
        if name not in on_inputs:
            for layer, loss in function_of(name)(model, layers, checked, resources, **options_of(name)).items():
                values[layer][name] = loss
    for layer, found in _measure_weights(layers, [n for n in columns if n not in on_samples], resources, progress):
        values[layer].update(found)
    rows = tuple(_row(layer, columns, values[layer.name]) for layer in layers)
    return Table(rows, facts or {}, {"metrics": requested})


def _measure_weights(
    layers: Sequence[Layer], columns: Sequence[str], resources: Resources, progress: Progress
) -> list[tuple[str, dict[str, Any]]]:
    """Layer names with their metrics of the weights alone; the layers are divided among the processes of a run."""
    groups = [list(layers)]  # layers that are in memory at the same time
    if resources.streamed:
        blocks = sorted({layer.block for layer in layers})
        groups = [[layer for layer in layers if layer.block == index] for index in blocks]
    measured: Values = {}
    for group in shard(groups) if columns else ():
        with resources.block(group[0].block, ahead=group[0].block + 1):
            measured |= measure_spectra(group, columns, progress)
    return [item for part in gather(measured) for item in part.items()]


def metric_names(text: str) -> list[str]:
    """The distinct metrics of a comma-separated list; raises BillhookError for an unknown one or an empty list."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise BillhookError("--metrics names none: give one, such as alpha_peak (billhook ls metrics lists them).")
    for name in names:
        canonical(name)
    return names


def progress_calls(metrics: Sequence[str], layers: int) -> int:
    """How often `measure` reports progress: once per layer for its weight and once for its inputs."""
    reads = {fact(name).reads for name in metrics}
    return layers * (("activations" in reads) + any(not fact(name).needs_text for name in metrics))


def _row(layer: Layer, columns: Sequence[str], values: dict[str, Any]) -> Row:
    numbers = {name: values[name] for name in columns if fact(name).name not in CURVES}
    curves = {name: tuple(values[name]) for name in columns if fact(name).name in CURVES}
    return Row(layer.name, layer.block, layer.kind, layer.shape, numbers, curves)


def _measure_inputs(block: Block, columns: Sequence[str], values: Values) -> list[str]:
    """Add the metrics of activations of a block's layers, computed together or one by one; returns their names."""
    layers = [layer for layer in block.layers if layer.name in values]
    for name in columns if layers else ():
        for group in [layers] if fact(name).block else [[layer] for layer in layers]:
            norms = [block.stats_of(layer).input_norm for layer in group]
            value = function_of(name)([layer.weight for layer in group], norms, **options_of(name))
            for layer in group:
                values[layer.name][name] = value
    return [layer.name for layer in layers]
