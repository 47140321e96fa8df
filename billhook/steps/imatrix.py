"""Measure the importance matrix of the model that a request names, for llama.cpp's quantizer."""

from pathlib import Path

from torch import Tensor

from billhook.engine.walk import Progress, walk
from billhook.errors import BillhookError
from billhook.export.imatrix import gguf_names, write_imatrix
from billhook.steps.inputs import ModelRequest
from billhook.steps.record import place
from billhook.steps.request import Opened, calibration_facts, open_request
from billhook.store.locate import locate_on_disk


def open_for_imatrix(request: ModelRequest) -> Opened:
    """Open model and calibration samples; raises BillhookError for an impossible request."""
    opened = open_request(request, True, "An importance matrix", streamed=True)
    if opened.source is None:
        raise BillhookError("An importance matrix needs a model directory, whose tensors have names.")
    return opened


def make_imatrix(opened: Opened, output: Path, progress: Progress = lambda layer: None) -> int:
    """Write the sums of the squared inputs of the layers on the samples; returns the number of weights in the file."""
    assert opened.source is not None
    names = gguf_names(opened.source)
    on_disk = {source for sources in names.values() for source in sources}
    facts = {layer.name: {"shape": layer.shape, **place(layer)} for layer in opened.layers}
    places = locate_on_disk(opened.model, facts, on_disk)
    sums: dict[str, tuple[Tensor, int]] = {}
    for block in walk(opened.model, opened.batches, ("input_norm",), read_only=True, resources=opened.resources):
        for layer in block.layers:
            stats = block.stats_of(layer)
            if layer.name in places and stats.input_norm is not None:
                squares = stats.input_norm.float().cpu() ** 2 * stats.sequences
                pieces = places[layer.name].get("pieces", [places[layer.name]])
                sums |= {piece["tensor"]: (squares, stats.tokens) for piece in pieces}
            progress(layer.name)
    known = calibration_facts(opened)
    assert known is not None
    return write_imatrix(names, sums, output, str(known["source"]), known["samples"], known["length"])
