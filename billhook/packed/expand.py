"""Packed tensors as torch tensors: memory-mapped, and expanded to the bytes of the dense files."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.packed.format import BLOCK_WEIGHTS, Matrix, Packed, PackedShard
from billhook.runtime import native
from billhook.runtime.fallback import unpack_bits
from billhook.store.shards import INDEX
from billhook.store.tensor_bytes import DTYPES, tensor_bytes


@dataclass(frozen=True)
class PackedTensor:
    """A packed tensor with its parts: bitmask, uint8 [rows, ...], values 1-D, and scales and signs or None."""

    facts: Matrix
    bitmask: Tensor
    values: Tensor
    scales: Tensor | None
    signs: Tensor | None

    @cached_property
    def starts(self) -> Tensor:
        """The position of each row's first value, int64 [rows + 1].

        Raises BillhookError where the bitmask does not keep as many weights as there are values.
        """
        try:
            starts = native.row_starts(self.bitmask, self.facts.columns)
        except BillhookError as error:
            raise BillhookError(f"{self.facts.name}: {error}") from None
        if int(starts[-1]) != self.facts.nnz:
            found = f"the bitmask keeps {int(starts[-1])} weights, there are {self.facts.nnz} values"
            raise BillhookError(f"{self.facts.name}: {found}. The packed file is damaged; pack the model again.")
        return starts

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the matrix, dense, in the dtype on disk."""
        part = slice(first, last)
        dense = native.expand(self.bitmask, self.values, self.starts, self.facts.columns, rows=part, scales=self.scales)
        dense = dense.to(DTYPES[self.facts.dtype])
        if self.signs is not None:
            dense[unpack_bits(self.signs[part], self.facts.columns)] = -0.0
        return dense

    def blocks(self) -> Iterator[Tensor]:
        """The dense tensor in its order on disk, in parts of bounded size (one part if it is transposed)."""
        rows = self.facts.rows
        if self.facts.transposed:
            yield self.rows(0, rows).T.contiguous()
            return
        step = max(1, BLOCK_WEIGHTS // self.facts.columns)
        for first in range(0, rows, step):
            yield self.rows(first, min(first + step, rows))

    def dense(self) -> Tensor:
        """The dense tensor as on disk."""
        return torch.cat(list(self.blocks())).view(self.facts.shape)


def packed_tensor(packed: Packed, shard: PackedShard, name: str) -> PackedTensor:
    """The packed tensor `name` of a shard, memory-mapped."""
    facts = packed.matrices[name]
    parts = {part.removeprefix(f"{name}."): stored_tensor(shard, part) for part in facts.parts}
    return PackedTensor(facts, parts["bitmask"], parts["values"], parts.get("scales"), parts.get("signs"))


def stored_tensor(shard: PackedShard, name: str) -> Tensor:
    """A tensor as it is stored in a packed file, memory-mapped; raises BillhookError for a dtype unknown to torch."""
    entry = shard.file.entries[name]
    if entry.dtype not in DTYPES:
        raise BillhookError(f"{shard.file.path}: {name} is {entry.dtype}, which cannot be loaded.")
    raw = shard.raw(name)
    if not len(raw):
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.from_numpy(raw).view(DTYPES[entry.dtype]).view(entry.shape)


def expand_file(packed: Packed, shard: PackedShard, write: Callable[[memoryview | bytes], object] | None = None) -> str:
    """The SHA-256 of the dense file that a packed one replaces; its bytes are given to `write` in order."""
    digest = hashlib.sha256()
    for piece in _dense_bytes(packed, shard):
        digest.update(piece)
        if write is not None:
            write(piece)
    return digest.hexdigest()


def _dense_bytes(packed: Packed, shard: PackedShard) -> Iterator[memoryview | bytes]:
    yield shard.header
    for name in shard.entries:
        if name in packed.matrices:
            yield from map(tensor_bytes, packed_tensor(packed, shard, name).blocks())
        else:
            yield shard.raw(name).data


def dense_bytes(packed: Packed) -> int:
    """Total bytes of the dense weight files."""
    return sum(max((e.stop for e in shard.entries.values()), default=len(shard.header)) for shard in packed.shards)


def unpack_files(packed: Packed, folder: Path, progress: Callable[[str], None]) -> None:
    """Write the dense weight files and their index into `folder`; `progress` is called with the name of each file.

    Raises BillhookError where a file is not the one that was packed.
    """
    for shard in packed.shards:
        with open(folder / shard.name, "wb") as file:
            found = expand_file(packed, shard, file.write)
        if found != shard.sha256:
            raise BillhookError(f"{packed.path}: unpacking {shard.name} does not give the file that was packed.")
        progress(shard.name)
    if packed.record["index"] is not None:
        (folder / INDEX).write_text(packed.record["index"], encoding="utf-8", newline="")
