"""The statistics of layers from an importance matrix file, instead of from text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from billhook.architectures.layers import Layer
from billhook.errors import BillhookError
from billhook.export.imatrix import gguf_names, read_imatrix
from billhook.methods.statistics import LayerStats
from billhook.steps.parts import Parts

NOTE = (
    "the importance matrix weighs the columns of a layer and nothing else: gptq with calibration text lost 1.4 to 4 "
    "times less at the same bits in our measurements."
)


def imatrix_stats(path: Path, source: Path, layers: Sequence[Layer], parts: Parts) -> Mapping[str, LayerStats]:
    """The statistics of the layers that are in the file, by name.

    Raises BillhookError for a damaged file, and for one of another model.
    """
    given, found = read_imatrix(path), dict[str, LayerStats]()
    places = {tensor: (name, sources) for name, sources in gguf_names(source).items() for tensor in sources}
    for layer in layers:
        part = parts[layer.name][0]
        name, sources = places.get(part.tensor, ("", (part.tensor,)))
        values, columns = given.get(name), layer.shape[1]
        if values is None:
            continue
        values = values.reshape(-1, columns) if len(values) == 1 and values.size % columns == 0 else values
        row = part.index if part.index is not None else sources.index(part.tensor) if len(sources) > 1 else 0
        if values.shape[1] != columns or row >= len(values):
            raise BillhookError(
                f"{path} is of another model: {name} has {values.shape[1]} columns there, and {layer.name} {columns}."
            )
        found[layer.name] = LayerStats(1, 1, input_norm=torch.from_numpy(values[row].copy()).sqrt())
    if not found:
        raise BillhookError(f"{path} holds none of the layers of this model.")
    return found
