"""Select the tensors of a checkpoint that are packed: those of two or more dimensions whose packed form is smaller."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from billhook.errors import BillhookError
from billhook.packed.format import BLOCK_WEIGHTS, FLOATS, ITEM_BYTES, PARTS, Matrix
from billhook.store.shards import Entry, Shard


def select_tensors(
    shards: Sequence[Shard],
    transposed: Callable[[str], bool],
    int8: bool,
    group: int | None,
    progress: Callable[[str], None] = lambda tensor: None,
) -> dict[str, Matrix]:
    """The tensors to pack, by name, in the order of the files; `transposed(name)` is whether one is stored [in, out].

    A tensor is selected if its packed form with unchanged values is smaller. Raises BillhookError if there is none.
    """
    names = {name for shard in shards for name in shard.entries}
    selected: dict[str, Matrix] = {}
    most = (0.0, "")
    for shard in shards:
        for entry in shard.entries.values():
            if _suitable(entry, names):
                zeros, negative = _count_zeros(shard, entry)
                most = max(most, ((zeros + negative) / math.prod(entry.shape), entry.name))
                form = _smaller(entry, zeros, negative, len(entry.shape) == 2 and transposed(entry.name))
                if form is not None:
                    selected[entry.name] = replace(form, int8=int8, group=group)
            progress(entry.name)
    if not selected:
        folder = shards[0].path.parent
        others = {x.dtype for shard in shards for x in shard.entries.values() if len(x.shape) == 2} - set(FLOATS)
        if others:
            kinds = f"{' and '.join(sorted(others))} weights, and only {', '.join(FLOATS)} can be packed"
            raise BillhookError(f"{folder} holds {kinds}: convert the model first, for example to bfloat16.")
        found = f"the most zeros are in {most[1]}, {most[0]:.1%}" if most[1] else "no weight is zero"
        dense = f"{folder} is a dense model ({found})"
        raise BillhookError(f"{dense}: packing would not make it smaller. Prune it first: billhook prune.")
    return selected


def _suitable(entry: Entry, names: set[str]) -> bool:
    clash = any(f"{entry.name}.{part}" in names for part in PARTS)
    return entry.dtype in FLOATS and len(entry.shape) > 1 and math.prod(entry.shape) > 0 and not clash


def _count_zeros(shard: Shard, entry: Entry) -> tuple[int, int]:
    """The numbers of weights that are +0.0 and -0.0."""
    sign = 1 << (8 * ITEM_BYTES[entry.dtype] - 1)
    zeros = negative = 0
    flat = stored_integers(shard, entry).reshape(-1)
    for first in range(0, len(flat), BLOCK_WEIGHTS):
        block = flat[first : first + BLOCK_WEIGHTS]
        zeros += len(block) - int(np.count_nonzero(block))
        negative += int(np.count_nonzero(block == sign))
    return zeros, negative


def _smaller(entry: Entry, zeros: int, negative: int, transposed: bool) -> Matrix | None:
    """The smaller packed form, with -0.0 as kept values or as signs; None if it is not smaller than the dense form."""
    size = math.prod(entry.shape)
    kept = Matrix(entry.name, entry.dtype, entry.shape, transposed, size - zeros, 0, int8=False, group=None)
    forms = [kept, replace(kept, nnz=kept.nnz - negative, negative_zeros=negative)] if negative else [kept]
    best = min(forms, key=lambda form: form.packed_bytes)
    return best if best.packed_bytes < size * ITEM_BYTES[entry.dtype] else None


def packed_size(shard: Shard, matrices: Mapping[str, Matrix]) -> int:
    """The approximate size of the packed form of a file, in bytes."""
    sizes = (matrices[e.name].packed_bytes if e.name in matrices else e.stop - e.start for e in shard.entries.values())
    return 2 * len(shard.header) + sum(sizes)


def stored_integers(shard: Shard, entry: Entry) -> np.ndarray:
    """A floating-point tensor on disk, memory-mapped, in its shape, as unsigned integers of the same item size."""
    raw = np.memmap(shard.path, np.uint8, "r")[entry.start : entry.stop]
    return raw.view(f"<u{ITEM_BYTES[entry.dtype]}").reshape(entry.shape)
