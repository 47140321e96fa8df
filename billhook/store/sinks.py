"""Sinks write the tensors of a model to files.

Weights that a run did not change keep the bytes of the source, whatever dtype the run computed in.

`SameLayout` writes files like the source's: same tensors, names, order, dtypes and metadata, with other values. Tensors
that `transformers` renamed or fused while loading are converted back; where that is impossible, `StockLayout` lets
`save_pretrained` choose the layout.
"""

import os
import tempfile
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from billhook.errors import BillhookError
from billhook.store.checkpoint import quiet
from billhook.store.compute import dtype_name, most_frequent
from billhook.store.files import digest_ranges, fsync
from billhook.store.fitting import is_buffer
from billhook.store.locate import to_disk
from billhook.store.shards import Entry, Shard, copy_index, lay_out, put, read_shard, weight_files, weights_index
from billhook.store.tensor_bytes import DTYPES, as_stored, exact, read_tensor, tensor_bytes


class Sink(Protocol):
    """Writes a model in memory, as it is now, to a directory."""

    def write_all(self, folder: Path) -> None:
        """Write all weight files; raises JobError for a value that does not fit its dtype on disk."""
        ...


class BlockSink(Protocol):
    """A sink whose files have another layout than the source's, one for each block."""

    files: list[str]
    same_values: bool  # whether a block that is read again has the values that it had in memory

    @property
    def entries(self) -> Mapping[str, Any]:
        """The tensors of the source by name."""
        ...

    def begin(self, folder: Path, copied: Collection[str]) -> None:
        """Write what lies outside the blocks: tensors by their names in the source."""
        ...

    def begun(self, folder: Path) -> bool:
        """Whether that was written."""
        ...

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the tensors of a block, by their names in memory."""
        ...

    def digest(self, folder: Path, names: Iterable[str]) -> str:
        """A digest of the tensors of a block, or of those outside, by their names in the source."""
        ...

    def moved(self, folder: Path, index: int) -> None:
        """From now on read a finished block from its file."""
        ...


class SameLayout:
    """Files in the layout of the source directory. They can be written block by block, and continued after an
    interruption."""

    def __init__(self, model: PreTrainedModel, source: Path) -> None:
        self.model, self.source = model, source
        self.shards = [read_shard(file) for file in weight_files(source)]
        self.entries = {name: entry for shard in self.shards for name, entry in shard.entries.items()}
        self.index = weights_index(source)
        self.files = [shard.path.name for shard in self.shards] + ([self.index.name] if self.index else [])

    def write_all(self, folder: Path) -> None:
        """Write all weight files; raises JobError for a value that does not fit its dtype on disk."""
        state = self.model.state_dict()
        tensors = self.on_disk(state)
        self.begin(folder, [name for name in self.entries if name not in tensors])
        self.write(folder, state)

    def begin(self, folder: Path, copied: Collection[str]) -> None:
        """Create all files, with the source's values for the `copied` tensors and space for the others."""
        known = set(copied)
        for shard in self.shards:
            lay_out(shard, folder / shard.path.name, known.__contains__)
            fsync(folder / shard.path.name)
        if self.index is not None:
            size = sum(entry.stop - entry.start for entry in self.entries.values())
            copy_index(self.index, folder, size)

    def begun(self, folder: Path) -> bool:
        """Whether `folder` holds all files with the headers that `begin` writes."""
        try:
            return all(read_shard(folder / shard.path.name).header == shard.header for shard in self.shards)
        except BillhookError:
            return False

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write tensors, given by their names in memory, in the dtypes of the files, and flush them to the disk."""
        tensors = self.on_disk(state)
        for shard in self.shards:
            written = [entry for entry in shard.entries.values() if entry.name in tensors]
            if written:
                with open(folder / shard.path.name, "r+b", buffering=0) as file:
                    for entry in written:
                        put(file.fileno(), entry.start, _bytes(tensors[entry.name], shard, entry))
                    os.fsync(file.fileno())

    def digest(self, folder: Path, names: Iterable[str]) -> str:
        """SHA-256 over the values of tensors in the files, given their names there."""
        wanted, digest = set(names), sha256()
        for shard in self.shards:
            ranges = [(entry.start, entry.stop) for entry in shard.entries.values() if entry.name in wanted]
            digest_ranges(digest, folder / shard.path.name, ranges)
        return digest.hexdigest()

    def on_disk(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in memory, converted to those in the files."""
        converted = to_disk(self.model, state, self.entries)
        return {name: tensor for name, tensor in converted.items() if name in self.entries}

    def mismatch(self) -> str | None:
        """Why this layout cannot hold the tensors of the model (which may be on the meta device), or None.

        A tied weight may be on disk under only one of its names.
        """
        tensors = to_disk(self.model, self.model.state_dict(), self.entries)
        written = {tensors[name].data_ptr() for name in self.entries if name in tensors and not tensors[name].is_meta}
        for name, tensor in tensors.items():
            entry = self.entries.get(name)
            if entry is None and (tensor.is_meta or tensor.data_ptr() not in written):
                return f"{name} is not there"
            if entry is not None and (entry.shape != tuple(tensor.shape) or entry.dtype not in DTYPES):
                return f"{name} is {entry.dtype} {list(entry.shape)} there"
        return None


class StockLayout:
    """What `save_pretrained` writes, in the most frequent dtype and the largest size of the source's `shards`."""

    def __init__(self, model: PreTrainedModel, shards: list[Shard]) -> None:
        """Raises BillhookError where `save_pretrained` refuses the configuration of the model."""
        self.model, self.shards = model, shards
        try:
            with quiet(), tempfile.TemporaryDirectory(prefix="billhook.") as folder:
                model.save_pretrained(folder, state_dict={})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BillhookError(f"transformers cannot save {type(model).__name__}: {reason}") from None

    def write_all(self, folder: Path) -> None:
        """Write all weight files."""
        options: dict[str, Any] = {}
        if self.shards:
            sizes = (sum(entry.stop - entry.start for entry in shard.entries.values()) for shard in self.shards)
            options["max_shard_size"] = max(sizes)
            dtype = most_frequent(self.shards) or self.model.dtype
            options["state_dict"] = _cast(self.model.state_dict(), dtype)
        with quiet():
            self.model.save_pretrained(folder, **options)


def choose_sink(model: PreTrainedModel, source: Path | None) -> tuple[Sink, str | None]:
    """The sink for a model loaded from `source` (None: built in memory), and a note where its layout differs."""
    if source is None or not weight_files(source):
        return StockLayout(model, []), None
    same = SameLayout(model, source)
    if reason := same.mismatch():
        note = f"The weights cannot be converted back to the layout of {source} ({reason})"
        stored = most_frequent(same.shards)
        rounded = "" if stored is None or exact(stored, model.dtype) else f", rounded to {dtype_name(model.dtype)}"
        return StockLayout(model, same.shards), f"{note}; they were written in the layout of transformers{rounded}."
    return same, None


def left_over(model: PreTrainedModel, source: Path | None) -> list[str]:
    """A note where the files of `source` hold tensors that the model does not have, other than unused buffers."""
    if source is None or (same := SameLayout(model, source)).mismatch():
        return []
    known = to_disk(model, model.state_dict(), same.entries)
    names = [name for name in same.entries if name not in known and not is_buffer(name)]
    if not names:
        return []
    more = f" and {len(names) - 1} more tensors are" if len(names) > 1 else " is"
    return [f"{min(names)}{more} not used by {type(model).__name__} and kept as stored."]


def _bytes(tensor: Tensor, shard: Shard, entry: Entry) -> memoryview:
    """The little-endian bytes of `tensor` in the dtype of `entry`, those of the source where it was kept."""
    return tensor_bytes(as_stored(entry.name, tensor, DTYPES[entry.dtype], lambda: read_tensor(shard.path, entry)))


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast the floating-point tensors; tensors that share memory still share it afterwards."""
    done: dict[int, Tensor] = {}
    return {k: done.setdefault(v.data_ptr(), v.to(dtype)) if v.is_floating_point() else v for k, v in state.items()}
