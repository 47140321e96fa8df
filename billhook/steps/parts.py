"""Which matrices on disk a layer consists of: one, or several, such as gate and up of an expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from billhook.architectures.layers import Layer
from billhook.errors import BillhookError, ignoring
from billhook.methods.quantize.grid import Quantized, Scales
from billhook.steps.record import place
from billhook.steps.request import Opened
from billhook.store.locate import locate_on_disk


@dataclass(frozen=True)
class Part:
    """The rows `first` to `last` (exclusive) of a layer, which are the tensor on disk, or matrix `index` of it; its
    matrices are [in, out] if `transposed`."""

    tensor: str
    index: int | None
    transposed: bool
    first: int
    last: int

    def of(self, weight: Quantized) -> Quantized:
        """The part of a quantized layer."""
        rows, scales = slice(self.first, self.last), weight.scales
        if self.first == 0 and self.last == len(weight.codes):
            return weight
        offset = None if scales.offset is None else scales.offset[rows]
        parts = {name: values[rows] for name, values in scales.parts.items()}
        return Quantized(weight.grid, weight.codes[rows], Scales(scales.scale[rows], offset, parts))

    def to_json(self) -> dict[str, Any]:
        """Its place as in billhook.json."""
        return {"tensor": self.tensor, "index": self.index, "transposed": self.transposed, "rows": None}


Parts = Mapping[str, Sequence[Part]]  # by layer


def layer_parts(opened: Opened) -> dict[str, list[Part]]:
    """The parts of every layer that is quantized.

    Raises BillhookError for convolutions, where a layer is only some rows of a tensor, and for experts in one tensor of
    which some are not quantized.
    """
    stream = opened.resources.stream
    assert stream is not None
    if convolution := next((layer for layer in opened.layers if layer.is_convolution), None):
        raise BillhookError(f"{convolution.name} is a convolution, and only linear layers can be quantized.")
    facts = {layer.name: {"shape": list(layer.shape), **place(layer)} for layer in opened.layers}
    found = locate_on_disk(opened.model, facts, stream.source)
    parts = {layer.name: _parts(layer, found[layer.name], stream.source) for layer in opened.layers}
    counts: dict[str, int] = {}
    for part in (part for several in parts.values() for part in several):
        counts[part.tensor] = counts.get(part.tensor, 0) + 1
    for tensor, count in counts.items():
        if count != (wanted := prod(stream.source[tensor].entry.shape[:-2])):
            raise BillhookError(f"{tensor} holds {wanted} experts: quantize all of them or none (--ignore).")
    return parts


def _parts(layer: Layer, where: Mapping[str, Any], source: Mapping[str, Any]) -> list[Part]:
    parts, first, here = list[Part](), 0, place(layer)
    pieces = where.get("pieces", [where])
    if here["tensor"] in source and any(piece.get("tensor") not in source for piece in pieces):
        pieces = [here]  # on disk as it is in memory, which transformers would not write
    for piece in pieces:
        if piece.get("tensor") not in source or piece.get("rows") is not None or piece.get("shuffled"):
            raise BillhookError(
                f"{layer.name} is not a matrix of its own in the files but rows of a larger one, which quantize does "
                f"not support: leave it out with --ignore {layer.name}."
            )
        last = first + source[piece["tensor"]].entry.shape[-1 if piece["transposed"] else -2]
        parts.append(Part(piece["tensor"], piece["index"], bool(piece["transposed"]), first, last))
        first = last
    assert first == layer.shape[0], layer.name
    return parts


def check_matrices(layers: Sequence[Layer], parts: Parts) -> None:
    """Raise BillhookError, naming the layer, unless all are linear layers whose matrices are [out, in] on disk."""
    unread = [x for x in layers if x.expert is not None or any(part.transposed for part in parts[x.name])]
    if unread:
        what = "an expert" if unread[0].expert is not None else "stored as [in, out]"
        raise BillhookError(
            f"{unread[0].name} is {what}, which transformers does not read from a compressed-tensors directory: use a "
            f"GGUF type, such as q4_k, or leave these layers out: {ignoring([layer.name for layer in unread])}."
        )


def part_types(parts: Parts, types: Mapping[str, str]) -> dict[str, str]:
    """The types of tensors on disk, given those of layers; raises BillhookError for experts in one tensor that
    differ."""
    found: dict[str, str] = {}
    for layer, type in types.items():
        for part in parts[layer]:
            if found.setdefault(part.tensor, type) != type:
                raise BillhookError(f"The experts in {part.tensor} must share a type.")
    return found


def transposed(parts: Parts) -> set[str]:
    """The tensors on disk whose matrices are [in, out]."""
    return {part.tensor for several in parts.values() for part in several if part.transposed}


def where(parts: Sequence[Part]) -> dict[str, Any]:
    """The place of a layer as in billhook.json."""
    if len(parts) > 1:
        return {"pieces": [part.to_json() for part in parts]}
    return {key: value for key, value in parts[0].to_json().items() if key != "rows"}
