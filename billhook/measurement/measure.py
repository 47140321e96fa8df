"""Fill the table that allocators read: one pass over the layers of a model.

What a metric looks at is known from its name (`billhook.plan.metrics`): the weight alone, the inputs of the dense
model's layers, or its loss.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

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
    """Measure `metrics` (and curves) of every layer; beside an exponent, the KS distance of its fit.

    `batches` are token ids int64 [windows, length] or mappings of keyword arguments, needed by the metrics that look at
    activations or the loss; `layers` restricts the table; `facts` describes the model (name, digest) and goes into the
    table. `progress` is called with the name of each finished layer. Raises BillhookError for an unknown metric, or one
    that needs batches when there are none.
    """
    layers = find_layers(model) if layers is None else layers
    asked = [canonical(name) for name in ([metrics] if isinstance(metrics, str) else metrics)]
    columns = list(dict.fromkeys(column for name in asked for column in (name, *companions(name))))
    on_samples = [name for name in columns if fact(name).needs_text]
    checked = as_batches(model, batches) if on_samples else []
    if on_samples and not checked:
        looks = "activations" if fact(on_samples[0]).reads == "activations" else "the loss"
        raise BillhookError(f"The metric {on_samples[0]} looks at {looks}: give text with --calibration SOURCE.")
    values: Values = {layer.name: {} for layer in layers}
    _measure_activations(
        model, checked, [n for n in on_samples if fact(n).reads == "activations"], values, resources, progress
    )
    for name in on_samples:
        if fact(name).reads in ("loss", "trial"):
            for layer, loss in function_of(name)(model, layers, checked, resources, **options_of(name)).items():
                values[layer][name] = loss
    _measure_weights(model, layers, [name for name in columns if name not in on_samples], values, resources, progress)
    return Table(tuple(_row(layer, columns, values[layer.name]) for layer in layers), facts or {}, {"metrics": asked})


def _measure_activations(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    columns: Sequence[str],
    values: Values,
    resources: Resources,
    progress: Progress,
) -> None:
    for block in walk(model, batches, ("input_norm",), read_only=True, resources=resources) if columns else ():
        _of_activations(block, columns, values)
        for layer in block.layers:
            if layer.name in values:
                progress(layer.name)


def _measure_weights(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    columns: Sequence[str],
    values: Values,
    resources: Resources,
    progress: Progress,
) -> None:
    """Metrics of the weights alone; the processes of a run share the layers."""
    groups = [list(layers)]  # layers that are in memory at the same time
    if resources.streamed:
        blocks = sorted({layer.block for layer in layers})
        groups = [[layer for layer in layers if layer.block == index] for index in blocks]
    measured: Values = {}
    for group in shard(groups) if columns else ():
        with resources.block(group[0].block, ahead=group[0].block + 1):
            measured |= measure_spectra(group, columns, progress)
    for part in gather(measured):
        for layer, found in part.items():
            values[layer].update(found)


def metric_names(text: str) -> list[str]:
    """The metrics of a comma-separated list, each once; raises BillhookError for an unknown one or none at all."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise BillhookError("--metrics names none: give one, such as alpha_peak (billhook ls metrics lists them).")
    for name in names:
        canonical(name)
    return names


def steps(metrics: Sequence[str], layers: int) -> int:
    """How often `measure` reports progress: a layer once for its weight and once for its inputs."""
    reads = {fact(name).reads for name in metrics}
    return layers * (("activations" in reads) + any(not fact(name).needs_text for name in metrics))


def _row(layer: Layer, columns: Sequence[str], values: dict[str, Any]) -> Row:
    numbers = {name: values[name] for name in columns if fact(name).name not in CURVES}
    curves = {name: tuple(values[name]) for name in columns if fact(name).name in CURVES}
    return Row(layer.name, layer.block, layer.kind, layer.shape, numbers, curves)


def _of_activations(block: Block, columns: Sequence[str], values: Values) -> None:
    """Compute metrics of activations for the measured layers of a block, together or one by one, and note them on
    each."""
    layers = [layer for layer in block.layers if layer.name in values]
    for name in columns if layers else ():
        for group in [layers] if fact(name).block else [[layer] for layer in layers]:
            norms = [block.stats[layer.name].input_norm for layer in group]
            value = function_of(name)([layer.weight for layer in group], norms, **options_of(name))
            for layer in group:
                values[layer.name][name] = value
