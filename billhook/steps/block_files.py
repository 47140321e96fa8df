"""The weights of a quantized model while they are written: one safetensors file for each block, and one for the rest.

Each file is written whole and renamed into place, so that a run that ends at any moment keeps its finished blocks. For
compressed-tensors these are the files of the directory. For GGUF types they hold the bytes of the quantized weights,
and are replaced by one GGUF file at the end. Everything that is neither quantized nor tuned keeps the source's bytes.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from billhook.engine.streaming import Stream
from billhook.methods.quantize.grid import Grid, Quantized
from billhook.steps.parts import Part
from billhook.store.files import replace_file, sha256
from billhook.store.fitting import Stored
from billhook.store.locate import to_disk
from billhook.store.shards import Shard, file_names, read_shard
from billhook.store.tensor_bytes import as_stored


class Form(Protocol):
    """How a quantized weight is stored in safetensors files: a module of `billhook.export`."""

    def names(self, name: str) -> list[str]:
        """The names of the tensors of the weight called `name`."""
        ...

    def pack(self, name: str, weight: Quantized) -> dict[str, Tensor]:
        """Its tensors by name."""
        ...

    def read(self, name: str, grid: Grid, shards: Iterable[Shard]) -> Quantized:
        """The weight called `name` in files."""
        ...


class Decoded(Stored):
    """A quantized tensor in a file, which is decoded when it is read; `source` is the original, with matrices [in, out]
    if `transposed`."""

    def __init__(self, form: Form, grid: Grid, shard: Shard, source: Stored, transposed: bool) -> None:
        self.form, self.grid, self.shard, self.source, self.transposed = form, grid, shard, source, transposed
        self.path, self.entry, self.dtype, self.lazy = shard.path, source.entry, source.dtype, True

    def read(self) -> Tensor:
        """The decoded values in float32."""
        values = self.form.read(self.entry.name, self.grid, [self.shard]).decode(torch.float32)
        *several, out, columns = self.entry.shape
        if self.transposed:
            return values.view(*several, columns, out).transpose(-1, -2).contiguous()
        return values.view(*several, out, columns)


class FilePerBlock:
    """What sinks have in common that write one file for the tensors outside of the blocks of a streamed model, and then
    one for each of `count` blocks."""

    def __init__(self, stream: Stream, count: int) -> None:
        self.stream, self.entries, self.files = stream, stream.source, file_names(count + 1)
        self._block = {name: index for index, names in enumerate(stream.names) for name in names}

    def begun(self, folder: Path) -> bool:
        """Whether the file of the tensors outside of the blocks exists."""
        return (folder / self.files[0]).is_file()

    def _number(self, state: Mapping[str, Tensor]) -> int:
        """The number of the block with these tensors, by their names in memory."""
        first = next(iter(state))
        return next(i for i, prefix in enumerate(self.stream.prefixes) if first.startswith(f"{prefix}."))

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


class BlockFiles(FilePerBlock):
    """The sink of a quantized model; `grids` are those of the quantized tensors on disk.

    `outside` quantizes a tensor outside of the blocks, given its name; the matrices of `transposed` tensors are [in,
    out] in the source. Where `tuned`, norms and biases of blocks are those in memory, in the source's dtype.
    """

    def __init__(
        self,
        stream: Stream,
        grids: Mapping[str, Grid],
        form: Form,
        outside: Callable[[str], Quantized],
        transposed: Collection[str] = (),
        *,
        tuned: bool = False,
    ) -> None:
        super().__init__(stream, len(stream.blocks))
        self.grids, self.form, self.outside, self.transposed = grids, form, outside, transposed
        self.tuned, self.same_values = tuned, not tuned  # whether the files have the values in memory
        self.made: dict[str, dict[int | None, Quantized]] = {}

    def add(self, part: Part, weight: Quantized) -> None:
        """Keep the part of a quantized layer that is a matrix on disk until its file is written."""
        self.made.setdefault(part.tensor, {})[part.index] = part.of(weight)

    def begin(self, folder: Path, copied: Collection[str]) -> None:
        """Write the file of the tensors outside of the blocks."""
        self._write(folder / self.files[0], copied)

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the file of the block with the tensors `state`, by their names in memory; the added ones are stored."""
        index = self._number(state)
        vectors = {name: value for name, value in state.items() if self.tuned and value.ndim == 1}
        changed = to_disk(self.stream.model, vectors, self.entries)
        self._write(folder / self.files[index + 1], self.stream.names[index], changed)

    def digest(self, folder: Path, names: Iterable[str]) -> str:
        """The SHA-256 of the file of these tensors: those of one block, or those outside of the blocks."""
        indices = {self._block.get(name, -1) for name in names}
        path = folder / self.files[min(indices, default=-1) + 1]
        return sha256(path) if path.is_file() else ""

    def moved(self, folder: Path, index: int) -> None:
        """From now on read a finished block from its file."""
        self.stream.stored.update(self.stored(folder, index))

    def stored(self, folder: Path, index: int) -> dict[str, Stored]:
        """Where the tensors of a finished block are read from."""
        shard, source = read_shard(folder / self.files[index + 1]), self.stream.source
        return {
            name: Decoded(self.form, self.grids[name], shard, source[name], name in self.transposed)
            if name in self.grids
            else Stored(shard.path, shard.entries[name], lazy=True)
            for name in self.stream.names[index]
        }

    def raw(self, folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
        """Name, type and bytes, memory-mapped [out, n], of every quantized tensor that is one tensor in the files."""
        for name in self.files:
            shard = read_shard(folder / name)
            for entry in shard.entries.values():
                if entry.name in self.grids:
                    data = np.memmap(shard.path, np.uint8, "r", offset=entry.start, shape=entry.shape)
                    yield entry.name, self.grids[entry.name].name, data

    def _write(self, path: Path, names: Collection[str], changed: Mapping[str, Tensor] | None = None) -> None:
        """Write a file; tensors that are not quantized are the source's, or have `changed` values."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in self.grids:
                tensors |= self._packed(name)
                continue
            value = Stored(self.entries[name].path, self.entries[name].entry, lazy=False).read()
            new = (changed or {}).get(name, value)
            tensors[name] = as_stored(name, new, value.dtype, value.clone)
        self._save(path, tensors)

    def _packed(self, name: str) -> dict[str, Tensor]:
        """The tensors of a quantized tensor; of several matrices in one they are stacked."""
        if name not in self._block:
            return self.form.pack(name, self.outside(name))
        made = self.made.pop(name)
        if None in made:
            return self.form.pack(name, made[None])
        return {name: torch.stack([self.form.pack(name, made[index])[name] for index in range(len(made))])}
