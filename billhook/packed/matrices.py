"""Packed tensors as torch sees them: mapped from the file without a copy, and expanded to the bytes they had."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.packed.format import Matrix, Packed, PackedShard
from billhook.packed.select_tensors import BLOCK_WEIGHTS
from billhook.runtime import native
from billhook.runtime.fallback import unpack_bits
from billhook.store.tensor_bytes import DTYPES, tensor_bytes

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Expandable:
    """A packed tensor with its parts: bitmask, uint8 [rows, ...], values 1-D, and scales and signs or None."""

    facts: Matrix
    bitmask: Tensor
    values: Tensor
    scales: Tensor | None
    signs: Tensor | None

    @cached_property
    def starts(self) -> Tensor:
        """Where each row's values begin, int64 [rows + 1]; raises BillhookError where bitmask and number of values
        disagree."""
        try:
            starts = native.row_starts(self.bitmask, self.facts.columns)
        except BillhookError as error:
            raise BillhookError(f"{self.facts.name}: {error}") from None
        if int(starts[-1]) != self.facts.nnz:
            raise BillhookError(
                f"{self.facts.name}: the bitmask keeps {int(starts[-1])} weights, there are {self.facts.nnz} values. "
                "The packed file is damaged; pack the model again."
            )
        return starts

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the matrix, dense, in the dtype on disk."""
        part = slice(first, last)
        dense = native.expand(self.bitmask, self.values, self.starts, self.facts.columns, rows=part, scales=self.scales)
        dense = dense.to(FLOATS[self.facts.dtype])
        if self.signs is not None:
            dense[unpack_bits(self.signs[part], self.facts.columns)] = -0.0
        return dense

    def blocks(self) -> Iterator[Tensor]:
        """The dense tensor in its order on disk, in matrices of a bounded size (whole where it is transposed)."""
        rows = self.facts.rows
        if self.facts.transposed:
            yield self.rows(0, rows).T.contiguous()
            return
        step = max(1, BLOCK_WEIGHTS // self.facts.columns)
        for first in range(0, rows, step):
            yield self.rows(first, min(first + step, rows))

    def dense(self) -> Tensor:
        """The dense tensor as it is on disk."""
        return torch.cat(list(self.blocks())).view(self.facts.shape)


def expandable(packed: Packed, shard: PackedShard, name: str) -> Expandable:
    """The packed tensor `name` of a shard, mapped."""
    facts = packed.matrices[name]
    parts = {part.removeprefix(f"{name}."): mapped(shard, part) for part in facts.parts}
    return Expandable(facts, parts["bitmask"], parts["values"], parts.get("scales"), parts.get("signs"))


def mapped(shard: PackedShard, name: str) -> Tensor:
    """A tensor as it is stored in a packed file, mapped; raises BillhookError for a dtype that torch does not have."""
    entry = shard.file.entries[name]
    if entry.dtype not in DTYPES:
        raise BillhookError(f"{shard.file.path}: {name} is {entry.dtype}, which cannot be loaded.")
    raw = shard.raw(name)
    if not len(raw):
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.from_numpy(raw).view(DTYPES[entry.dtype]).view(entry.shape)


def dense_bytes(packed: Packed, shard: PackedShard) -> Iterator[memoryview | bytes]:
    """The dense file that a packed one stands for, from its first byte to its last, piece by piece."""
    yield shard.header
    for name in shard.entries:
        if name in packed.matrices:
            for block in expandable(packed, shard, name).blocks():
                yield tensor_bytes(block)
        else:
            yield shard.raw(name).data
