"""What all steps record in billhook.json alike."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from billhook.architectures.layers import Layer, find_layers
from billhook.engine.loop import LayerResult
from billhook.steps.request import Opened
from billhook.store.record import REFILLED, Record, located


def layer_notes(results: Iterable[LayerResult]) -> list[str]:
    """The notes of all layers, each with its layer's name."""
    return [f"{r.layer}: {note}" for r in results for note in r.notes]


def without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that can be published: of a path, only the file's name."""
    text = {key: value for key, value in options.items() if isinstance(value, str)}
    paths = [key for key, value in text.items() if key == "file" or value.startswith(("/", "~"))]
    return {key: Path(value).name if key in paths else value for key, value in options.items()}


def left_alone(before: Record | None, opened: Opened) -> dict[str, dict[str, Any]]:
    """The state, as recorded `before`, of the layers that a model has, by name, where a step does not change it.

    Zeros are counted again, and places found, when the layers are written; those of quantized layers are known.
    """
    present = {layer.name: layer for layer in find_layers(opened.model, convolutions=True, outside=True)}
    present |= {layer.name: layer for layer in opened.layers}  # beside adapters, those of the model have other names
    found = {}
    for name, facts in ({} if before is None else before.layers).items():
        if facts.get("type"):
            found[name] = dict(facts)
        elif name in present:
            counted = {key: value for key, value in facts.items() if key != "zeros" or not located(facts)}
            found[name] = counted | place(present[name])
    return found


def refilled_notes(refilled: int, before: Mapping[str, Any]) -> list[str]:
    """A note where so many zeros of a layer were `refilled`, and such notes of earlier steps; none without such.

    This happens where a criterion that updates the remaining weights has a lower sparsity than an earlier step, and
    where a storage type has no zero.
    """
    if not before:
        return []
    earlier = [note for note in before.get("notes", ()) if note.endswith(REFILLED)]
    return [*earlier, *([f"{refilled} {REFILLED}"] if refilled > 0 else [])]


def place(layer: Layer) -> dict[str, Any]:
    """Where a layer is in memory, from which `billhook.store.locate` finds its place on disk."""
    where = {"tensor": layer.stored_name, "index": layer.expert, "transposed": layer.transposed}
    first = layer.shape[0] * (layer.group or 0)
    return where if layer.group is None else where | {"rows": [first, first + layer.shape[0]]}
