"""Importance matrices for llama.cpp's quantizer: how much an error of each weight counts, by the inputs of its column.

The file is that of `llama-imatrix` (GGUF). It holds two tensors for each weight: `NAME.in_sum2`, the sum of its squared
inputs over all tokens, which is the diagonal of the Gram matrix, and `NAME.counts`, the number of tokens; of experts,
one row each.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from billhook.architectures.gguf_names import gguf_tensors
from billhook.export.gguf import full_config
from billhook.export.gguf_writer import Entry, add_tensors, write
from billhook.store.gguf_file import require_gguf
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
