"""Importance matrices for llama.cpp's quantizer: how much an error of each weight counts, by the inputs of its column.

The file is that of `llama-imatrix` (GGUF). It holds two tensors for each weight: `NAME.in_sum2`, the sum of its squared
inputs over all tokens, which is the diagonal of the Gram matrix, and `NAME.counts`, the number of tokens; of experts,
one row each. Files of earlier releases (.dat) are read too: a list of names with means times a number of calls.
"""

import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from billhook.architectures.gguf_names import gguf_tensors
from billhook.errors import BillhookError
from billhook.export.gguf import full_config
from billhook.export.gguf_writer import Entry, add_tensors, write
from billhook.store.gguf_file import read_gguf, require_gguf
from billhook.store.shards import read_shard, weight_files

Names = Mapping[str, tuple[str, ...]]  # name in GGUF files -> tensors on disk, several for experts
Sums = Mapping[str, tuple[Tensor, int]]  # tensor on disk -> sum of its squared inputs, float32 [in]; number of tokens


def gguf_names(source: Path) -> Names:
    """The weights of a model directory by their names in GGUF files; raises BillhookError for one without names."""
    require_gguf()
    shards = [read_shard(file) for file in weight_files(source)]
    shapes = {entry.name: entry.shape for shard in shards for entry in shard.entries.values()}
    return {tensor.name: tensor.sources for tensor in gguf_tensors(full_config(source), shapes)}


def write_imatrix(names: Names, sums: Sums, output: Path, text: str, windows: int, length: int) -> int:
    """Write the file; returns the number of weights in it. It was measured on so many `windows` of a `text`."""
    import gguf

    writer = gguf.GGUFWriter(None, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text])
    writer.add_uint32("imatrix.chunk_count", windows)
    writer.add_uint32("imatrix.chunk_size", length)
    entries = []
    for name, sources in names.items():
        if all(source in sums for source in sources):
            squares = np.stack([sums[source][0].float().cpu().numpy() for source in sources])
            counts = np.array([[sums[source][1]] for source in sources], np.float32)
            for suffix, values in (("in_sum2", squares), ("counts", counts)):
                entries.append(Entry(f"{name}.{suffix}", "f32", values.shape, partial(list, [values])))
    add_tensors(writer, entries)
    write(writer, entries, output)
    return len(entries) // 2


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """The mean squared inputs of each weight by its name in GGUF files, float32 [experts or 1, in].

    Raises BillhookError for a file that is damaged or holds something else.
    """
    try:
        with open(path, "rb") as file:
            new = file.read(4) == b"GGUF"
    except OSError as error:
        raise BillhookError(f"Cannot read {path}: {error.strerror or error}.") from None
    with np.errstate(invalid="ignore", over="ignore"):  # what is not a number is refused below
        found = _read_gguf_form(path) if new else _read_old_form(path)
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise BillhookError(f"{path} is damaged: the squared inputs of {name[:100]} are not numbers of 0 and more.")
    if not found:
        raise BillhookError(f"{path} is not an importance matrix of llama.cpp, or it is empty.")
    return found


def _read_gguf_form(path: Path) -> dict[str, np.ndarray]:
    file, found = read_gguf(path), {}
    for name, entry in file.tensors.items():
        counts = file.tensors.get(f"{name.removesuffix('.in_sum2')}.counts")
        if not name.endswith(".in_sum2") or counts is None:
            continue
        if (entry.type, counts.type) != ("f32", "f32") or entry.shape[:-1] != counts.shape[:-1]:
            raise BillhookError(f"{path} is damaged: {name[:100]} and its counts do not fit each other.")
        sums, numbers = (file.values(x).reshape(x.shape[-2] if len(x.shape) > 1 else 1, -1) for x in (entry, counts))
        found[name.removesuffix(".in_sum2")] = (sums / np.maximum(numbers[:, :1], 1)).astype(np.float32)
    return found


def _read_old_form(path: Path) -> dict[str, np.ndarray]:
    """The experts of a weight are one row here; their number is not in the file."""
    data, place, found = path.read_bytes(), 0, {}

    def take(count: int) -> bytes:
        nonlocal place
        if count < 0 or count > len(data) - place:
            raise ValueError("it ends too early")
        place += count
        return data[place - count : place]

    def number() -> int:
        value: int = struct.unpack("<i", take(4))[0]
        return value

    try:
        for _ in range(number()):
            name = take(number()).decode()
            calls, length = number(), number()
            values = np.frombuffer(take(4 * length), np.float32)
            if length > 0:
                found[name] = values[None] / np.float32(max(calls, 1))
    except (ValueError, struct.error) as error:
        raise BillhookError(f"{path} is not an importance matrix of llama.cpp, or it is damaged ({error}).") from None
    return found
