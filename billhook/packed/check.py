"""Check a packed directory completely, including the checksums of the dense files that it expands to in memory."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from billhook.errors import BillhookError
from billhook.packed.expand import expand_file, packed_tensor
from billhook.packed.format import Packed, PackedShard, open_packed
from billhook.runtime.fallback import unpack_bits
from billhook.store.shards import INDEX, Entry, Shard

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class DenseShard(Shard):
    """The dense file, not on disk, that a packed one replaces; the zeros of its tensors can be counted."""

    packed: Packed
    of: PackedShard

    def zeros(self, entry: Entry, index: int | None = None) -> np.ndarray:
        """As for a dense file; weights that int8 rounds to zero do not count."""
        if entry.name not in self.packed.matrices:
            return self.of.file.zeros(self.of.file.entries[entry.name], index)
        tensor = packed_tensor(self.packed, self.of, entry.name)
        facts = tensor.facts
        rows = slice(0, facts.rows) if index is None else slice(index * entry.shape[1], (index + 1) * entry.shape[1])
        if facts.int8:
            found = ~unpack_bits(tensor.bitmask[rows], facts.columns)
        else:
            found = tensor.rows(rows.start, rows.stop) == 0
        shape = entry.shape if index is None else entry.shape[1:]
        return (found.T if facts.transposed else found.reshape(shape)).numpy()


@dataclass(frozen=True)
class Examined:
    """The problems of a packed directory, and its dense form.

    `digests` has the SHA-256 of the dense weight files and their index; if `rounded` (int8), the files differ from the
    original ones. `zeros` of `weights` are removed in the packed `layers`.
    """

    problems: list[str]
    shards: list[DenseShard] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    rounded: bool = False
    layers: int = 0
    zeros: int = 0
    weights: int = 0


def examine(directory: Path) -> Examined:
    """Check a whole packed directory, expanding it piece by piece."""
    try:
        packed = open_packed(directory)
        problems = [*packed.problems(), *_unlisted(packed)]
        if not problems:
            problems = [
                f"{shard.file.path.name} does not expand to the {shard.name} that was packed: its SHA-256 differs."
                for shard in packed.shards
                if expand_file(packed, shard) != shard.sha256
            ]
    except BillhookError as error:
        return Examined([str(error)])
    digests = {shard.name: shard.sha256 for shard in packed.shards}
    if packed.record["index"] is not None:
        digests[INDEX] = hashlib.sha256(packed.record["index"].encode()).hexdigest()
    shards = [DenseShard(directory / s.name, s.header, dict(s.entries), packed, s) for s in packed.shards]
    rounded = any(matrix.int8 for matrix in packed.matrices.values())
    kept = sum(matrix.nnz for matrix in packed.matrices.values())
    return Examined(problems, shards, digests, rounded, len(packed.matrices), packed.weights - kept, packed.weights)


def _unlisted(packed: Packed) -> Iterator[str]:
    """Other weight files in the directory, which other programs would read instead."""
    known = {shard.file.path.name for shard in packed.shards}
    for path in sorted(packed.path.iterdir()):
        if path.suffix in _WEIGHTS and path.name not in known:
            yield f"{path.name} holds weights and does not belong to the packed model."
