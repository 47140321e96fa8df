"""Hidden states of the calibration text between two blocks, one tensor a batch, in memory or spilled to disk.

What exceeds the limit is in one unnamed temporary file (in TMPDIR or a given folder), which disappears when the process
ends, however it ends.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from billhook.store.tensor_bytes import tensor_bytes

SPILL_GIB = 8.0


class ActivationStore:
    """A list of tensors; those beyond `limit_gib` GiB are on disk. A tensor can be replaced by one of its shape."""

    def __init__(self, limit_gib: float = SPILL_GIB, folder: Path | None = None) -> None:
        self._limit, self._folder = limit_gib * 2**30, folder
        self._in_memory: list[Tensor | None] = []
        self._entries: list[tuple[int, Tensor, torch.device]] = []  # offset, a tensor like it without values, device
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def append(self, value: Tensor) -> None:
        """Add a tensor at the end."""
        like = torch.empty_like(value, device="meta", memory_format=torch.contiguous_format)
        self._entries.append((self._bytes, like, value.device))
        self._bytes += value.nbytes
        self._in_memory.append(None)
        self[len(self) - 1] = value

    def __setitem__(self, index: int, value: Tensor) -> None:
        offset, like, _ = self._entries[index]
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
        if offset + value.nbytes <= self._limit:
            self._in_memory[index] = value
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="billhook.", dir=self._folder, buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        self._file.seek(offset)
        data = tensor_bytes(value.cpu().contiguous())
        while data:
            data = data[self._file.write(data) :]

    def __getitem__(self, index: int) -> Tensor:
        if (found := self._in_memory[index]) is not None:
            return found
        offset, like, device = self._entries[index]
        value = torch.empty_like(like, device="cpu")
        assert self._file is not None
        data = tensor_bytes(value)
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            assert count
            data, offset = data[count:], offset + count
        return value.to(device)

    def take(self) -> Iterator[Tensor]:
        """Yield the tensors in order for the last time, each one in memory being released."""
        for index in range(len(self)):
            value, self._in_memory[index] = self[index], None
            yield value

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
