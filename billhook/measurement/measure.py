"""Measuring: one pass over the layers that fills the table allocators read.

What a metric looks at is known from its name (`billhook.plan.metrics`): the weight alone, the inputs of the dense
model's layers, or its loss.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer, find_layers
from billhook.distributed.collectives import gather, shard
from billhook.engine.streaming import resident, stream_of
from billhook.engine.walk import Block, Progress, walk
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import vocabulary_size
from billhook.measurement import canonical, function_of, options_of
from billhook.measurement.weights import measure_spectra
from billhook.plan.metrics import CURVES, companions, fact
from billhook.plan.table import Row, Table
from billhook.text.windows import as_batches

Values = dict[str, dict[str, Any]]


def measure(
    model: PreTrainedModel,
    metrics: str | Sequence[str] = ("alpha_peak",),
    *,
    batches: Tensor | Sequence[Tensor] = (),
    layers: Sequence[Layer] | None = None,
    facts: dict[str, Any] | None = None,
    progress: Progress = lambda layer: None,
) -> Table:
    """Measure `metrics` (and curves) of every layer of a model in memory; beside an exponent, the KS distance of its
    fit.

    `batches` are token ids [batch, length] int64 (one tensor: one batch), needed by the metrics that look at
    activations or the loss; `layers` restricts the table; `facts` describes the model (name, digest) and goes into the
    table. `progress` is called with the name of each finished layer. Raises BillhookError for an unknown metric, or one
    that needs batches when there are none.
    """
    layers = find_layers(model) if layers is None else layers
    asked = [canonical(name) for name in ([metrics] if isinstance(metrics, str) else metrics)]
    columns = list(dict.fromkeys(column for name in asked for column in (name, *companions(name))))
    with_text = [name for name in columns if fact(name).needs_text]
    batches = as_batches(batches, vocabulary_size(model)) if with_text else []
    if with_text and not batches:
        looks = "activations" if fact(with_text[0]).reads == "activations" else "the loss"
        raise BillhookError(f"The metric {with_text[0]} looks at {looks}: give text with --calibration SOURCE.")
    values: Values = {layer.name: {} for layer in layers}
    of_activations = [name for name in with_text if fact(name).reads == "activations"]
    if of_activations:
        for block in walk(model, batches, ("input_norm",), read_only=True):
            _of_activations(block, of_activations, values)
            for seen in block.layers:
                if seen.name in values:
                    progress(seen.name)
    for name in with_text:
        if fact(name).reads in ("loss", "trial"):
            for layer, loss in function_of(name)(model, layers, batches, **options_of(name)).items():
                values[layer][name] = loss
    of_weights = [name for name in columns if not fact(name).needs_text]
    if of_weights:
        measured: Values = {}
        for group in shard(_together(model, layers)):
            with resident(model, group[0].block, ahead=group[0].block + 1):
                measured |= measure_spectra(group, of_weights, progress)
        for part in gather(measured):
            for layer, found in part.items():
                values[layer].update(found)
    return Table(tuple(_row(layer, columns, values[layer.name]) for layer in layers), facts or {}, {"metrics": asked})


def _together(model: PreTrainedModel, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers that are in memory at the same time: those of a block if the model is streamed, all if it is not."""
    if stream_of(model) is None:
        return [list(layers)]
    return [[layer for layer in layers if layer.block == index] for index in sorted({layer.block for layer in layers})]


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
