"""Measure the layers of the model that a request names: the table that allocators read."""

from collections.abc import Sequence

from billhook.architectures.layers import find_layers
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.measurement.measure import measure
from billhook.plan.metrics import fact
from billhook.plan.table import Table
from billhook.steps.inputs import ModelRequest
from billhook.steps.request import Opened, calibration_facts, open_request


def open_to_measure(request: ModelRequest, metrics: Sequence[str]) -> Opened:
    """Open the model and the samples that `metrics` need."""
    activations = [name for name in metrics if fact(name).needs_text]
    streamed = not any(fact(name).reads == "trial" for name in metrics)
    return open_request(request, bool(activations), f"The metric {' and '.join(activations)}", streamed=streamed)


def measure_opened(opened: Opened, metrics: Sequence[str], progress: Progress = lambda layer: None) -> Table:
    """Measure the layers of an opened model."""
    table = measure(
        opened.model, metrics, batches=opened.batches, layers=opened.layers, facts=opened.facts,
        resources=opened.resources, progress=progress,
    )  # fmt: skip
    if (made := calibration_facts(opened)) is not None:
        table.made_by["calibration"] = made
    return table


def rows_of_table(table: Table, opened: Opened) -> Table:
    """The rows of a given table for the layers to prune; a table of the whole model can be used for any part of it.

    Raises BillhookError for a table of other weights, where the digests of both are known.
    """
    here, there = opened.facts, table.model
    if here["digest"] and there.get("digest") not in (None, here["digest"]):
        raise BillhookError(
            f"The table is of {there.get('name', 'another model')}, whose weights are not those of {here['name']}. "
            f"Make one with billhook measure {opened.source}, or use its plan: billhook plan TABLE, then --plan."
        )
    shapes = {layer.name: layer.shape for layer in find_layers(opened.model, convolutions=True, outside=True)}
    return table.only({layer.name for layer in opened.layers}, shapes)
