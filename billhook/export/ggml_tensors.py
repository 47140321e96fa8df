"""Quantized weights of GGUF types in safetensors files, while a GGUF file is made: their bytes, under the names that
the weights have in the model directory, uint8 [out, bytes of a row]."""

from collections.abc import Iterable

from torch import Tensor

from billhook.methods.quantize.ggml_bytes import pack as pack_bytes
from billhook.methods.quantize.ggml_bytes import unpack
from billhook.methods.quantize.grid import Grid, Quantized
from billhook.store.fitting import Stored
from billhook.store.shards import Shard


def names(name: str) -> list[str]:
    """The names of the tensors of the weight called `name`."""
    return [name]


def pack(name: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of the weight called `name` in the files, by name."""
    return {name: pack_bytes(weight)}


def read(name: str, grid: Grid, shards: Iterable[Shard]) -> Quantized:
    """The weight called `name` in files, of several matrices all rows; raises KeyError where they do not hold it,
    JobError where it is damaged."""
    found = [(shard.path, shard.entries[name]) for shard in shards if name in shard.entries]
    if not found:
        raise KeyError(name)
    return unpack(Stored(*found[0], lazy=False).read().flatten(0, -2), grid.name)
