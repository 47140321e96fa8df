"""Which tensors of a checkpoint are packed: those of two or three dimensions that take fewer bytes packed than
dense."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from billhook.errors import BillhookError
from billhook.packed.format import ITEM, PARTS, Matrix
from billhook.store.shards import Entry, Shard

BLOCK_WEIGHTS = 1 << 22  # looked at, packed or expanded at a time, so that memory does not grow with the tensor
FLOATS = ("BF16", "F16", "F32")


def choose(
    shards: Sequence[Shard],
    transposed: Callable[[str], bool],
    int8: bool,
    group: int | None,
    progress: Callable[[str], None] = lambda tensor: None,
) -> dict[str, Matrix]:
    """The tensors to pack, by name, in the order of the files; `transposed` tells of a tensor's name whether it is
    stored [in, out].

    Whether a tensor has zeros enough is decided by its size with values as they are, for int8 too: int8 alone is no
    reason to pack. Raises BillhookError when there is none.
    """
    names = {name for shard in shards for name in shard.entries}
    chosen: dict[str, Matrix] = {}
    most = (0.0, "")
    for shard in shards:
        for entry in shard.entries.values():
            if _fit(entry, names):
                zeros, negative = _count(shard, entry)
                most = max(most, ((zeros + negative) / math.prod(entry.shape), entry.name))
                form = _smaller(entry, zeros, negative, len(entry.shape) == 2 and transposed(entry.name))
                if form is not None:
                    chosen[entry.name] = replace(form, int8=int8, group=group)
            progress(entry.name)
    if not chosen:
        found = (
            f"the most zeros are in {most[1]}, {most[0]:.1%}"
            if most[1]
            else "no matrix of floating-point weights has a zero"
        )
        where = shards[0].path.parent
        raise BillhookError(
            f"{where} is a dense model ({found}): packing would not make it smaller. Prune it first: billhook prune."
        )
    return chosen


def _fit(entry: Entry, names: set[str]) -> bool:
    taken = any(f"{entry.name}.{part}" in names for part in PARTS)
    return entry.dtype in FLOATS and len(entry.shape) in (2, 3) and math.prod(entry.shape) > 0 and not taken


def _count(shard: Shard, entry: Entry) -> tuple[int, int]:
    """How many weights are +0.0, and how many -0.0."""
    sign = 1 << (8 * ITEM[entry.dtype] - 1)
    zeros = negative = 0
    flat = stored(shard, entry).reshape(-1)
    for first in range(0, len(flat), BLOCK_WEIGHTS):
        block = flat[first : first + BLOCK_WEIGHTS]
        zeros += len(block) - int(np.count_nonzero(block))
        negative += int(np.count_nonzero(block == sign))
    return zeros, negative


def _smaller(entry: Entry, zeros: int, negative: int, turned: bool) -> Matrix | None:
    """The smaller form, with -0.0 among the values or as signs; None where the dense form is not larger."""
    size = math.prod(entry.shape)
    kept = Matrix(entry.name, entry.dtype, entry.shape, turned, size - zeros, 0, int8=False, group=None)
    forms = [kept, replace(kept, nnz=kept.nnz - negative, negative_zeros=negative)] if negative else [kept]
    best = min(forms, key=packed_bytes)
    return best if packed_bytes(best) < size * ITEM[entry.dtype] else None


def packed_bytes(matrix: Matrix) -> int:
    """Bytes that the parts of a packed tensor take."""
    return sum(math.prod(shape) * ITEM[dtype] for dtype, shape in matrix.parts.values())


def packed_size(shard: Shard, matrices: Mapping[str, Matrix]) -> int:
    """About how long the packed form of a file will be."""
    sizes = (packed_bytes(matrices[e.name]) if e.name in matrices else e.stop - e.start for e in shard.entries.values())
    return 2 * len(shard.header) + sum(sizes)


def stored(shard: Shard, entry: Entry) -> np.ndarray:
    """A floating-point tensor on disk as unsigned integers of its item size, in its shape, mapped."""
    raw = np.memmap(shard.path, np.uint8, "r")[entry.start : entry.stop]
    return raw.view(f"<u{ITEM[entry.dtype]}").reshape(entry.shape)
