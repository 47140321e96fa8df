"""The weights of a quantized model while they are written: one safetensors file for each block, and one for the rest.

Each file is written whole and renamed into place, so that a run that ends at any moment keeps its finished blocks. The
files are those of the compressed-tensors directory. Everything that is not quantized keeps the source's bytes.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from billhook.engine.streaming import Stored, Stream
from billhook.errors import BillhookError
from billhook.export import compressed_tensors
from billhook.methods.quantize.grid import Quantized
from billhook.methods.quantize.scalar import Scalar
from billhook.store.files import replace_file, sha256, write_json
from billhook.store.shards import INDEX, Shard, read_shard


class Decoded(Stored):
    """A quantized tensor in a file, which is decoded when it is read."""

    def __init__(self, name: str, grid: Scalar, shard: Shard, dtype: torch.dtype) -> None:
        self.name, self.grid, self.shard, self.dtype, self.lazy = name, grid, shard, dtype, True
        self.path = shard.path
        self.entry = shard.entries[compressed_tensors.names(name)[0]]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the same shape without values."""
        shape = self.shard.entries[compressed_tensors.names(self.name)[2]]
        sizes = Stored(self.path, shape, lazy=False).read().tolist()
        return torch.empty(sizes, dtype=dtype or self.dtype, device="meta")

    def read(self) -> Tensor:
        """The decoded values in float32."""
        return compressed_tensors.read(self.name, self.grid, [self.shard]).decode(torch.float32)


class BlockFiles:
    """A sink with one file for each block of a streamed model; `types` are the grids of the quantized tensors on disk.

    It has the interface of `billhook.store.sinks.SameLayout` that an unfinished output needs.
    """

    def __init__(self, stream: Stream, types: Mapping[str, Scalar]) -> None:
        self.stream, self.types = stream, types
        self.entries = stream.source
        self.made: dict[str, Quantized] = {}
        count = len(stream.blocks) + 1
        self.files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        self._block = {name: index for index, names in enumerate(stream.names) for name in names}

    def add(self, name: str, weight: Quantized) -> None:
        """Keep a quantized tensor, by its name on disk, until its block is written."""
        self.made[name] = weight

    def begin(self, folder: Path, outside: Collection[str]) -> None:
        """Write the file of the tensors outside of the blocks."""
        self._write(folder / self.files[0], outside)

    def begun(self, folder: Path) -> bool:
        """Whether that file exists."""
        return (folder / self.files[0]).is_file()

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the file of the block whose tensors were added."""
        (index,) = {self._block[name] for name in self.made}
        self._write(folder / self.files[index + 1], self.stream.names[index])
        self.made.clear()

    def digest(self, folder: Path, names: Iterable[str]) -> str:
        """The SHA-256 of the file of these tensors: those of one block, or those outside of the blocks."""
        indices = {self._block.get(name, -1) for name in names}
        path = folder / self.files[min(indices, default=-1) + 1]
        return sha256(path) if path.is_file() else ""

    def stored(self, folder: Path, index: int) -> dict[str, Stored]:
        """Where the tensors of a finished block are read from."""
        shard, source = read_shard(folder / self.files[index + 1]), self.stream.source
        return {
            name: Decoded(name, self.types[name], shard, source[name].dtype)
            if name in self.types
            else Stored(shard.path, shard.entries[name], lazy=True)
            for name in self.stream.names[index]
        }

    def finish(self, folder: Path) -> None:
        """Write the index of all files."""
        shards = [read_shard(folder / name) for name in self.files]
        total = sum(entry.stop - entry.start for shard in shards for entry in shard.entries.values())
        where = {name: shard.path.name for shard in shards for name in shard.entries}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})

    def _write(self, path: Path, names: Collection[str]) -> None:
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in self.made:
                tensors |= compressed_tensors.pack(name, self.made[name])
            else:
                tensors[name] = Stored(self.entries[name].path, self.entries[name].entry, lazy=False).read()
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def check_places(places: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The tensor on disk of each layer, given its place there (`billhook.store.locate`).

    Raises BillhookError for a layer that is not a whole matrix [out, in] of its own in the files.
    """
    for layer, place in places.items():
        if place.get("tensor") is None or place.get("index") is not None or place.get("transposed"):
            raise BillhookError(
                f"{layer} is stored in a form that compressed-tensors cannot hold (fused, transposed, or an expert of "
                f"a larger tensor): leave it out with --ignore {layer}, or use a GGUF type."
            )
    return {layer: str(place["tensor"]) for layer, place in places.items()}
