"""Hidden states of the calibration text between two blocks, one tensor a batch: in memory, or on disk where they are
too large.

What does not fit the limit lies in one temporary file without a name (in TMPDIR or a given folder), which is gone with
the process, however it ends.
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
    """A list of tensors, of which those beyond `limit_gib` GiB are on disk; a tensor may be replaced by one of the same
    size."""

    def __init__(self, limit_gib: float = SPILL_GIB, folder: Path | None = None) -> None:
        self._limit = limit_gib * 2**30
        self._folder = folder
        self._kept: list[Tensor | None] = []
        self._places: list[
            tuple[int, Tensor, torch.device]
        ] = []  # where a tensor is in the file, one like it without values, its device
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def append(self, value: Tensor) -> None:
        """Add a tensor at the end."""
        place = self._bytes
        self._bytes += value.nbytes
        self._places.append(
            (place, torch.empty_like(value, device="meta", memory_format=torch.contiguous_format), value.device)
        )
        self._kept.append(None)
        self[len(self) - 1] = value

    def __setitem__(self, index: int, value: Tensor) -> None:
        place, like, _ = self._places[index]
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
        if place + value.nbytes <= self._limit:
            self._kept[index] = value
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="billhook.", dir=self._folder, buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        self._file.seek(place)
        data = tensor_bytes(value.cpu().contiguous())
        while data:
            data = data[self._file.write(data) :]

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        if kept is not None:
            return kept
        place, like, device = self._places[index]
        value = torch.empty_like(like, device="cpu")
        assert self._file is not None
        data = tensor_bytes(value)
        while data:
            count = os.preadv(self._file.fileno(), [data], place)
            assert count
            data, place = data[count:], place + count
        return value.to(device)

    def take(self) -> Iterator[Tensor]:
        """Give the tensors back in order, for the last time: those in memory are forgotten one by one."""
        for index in range(len(self)):
            value, self._kept[index] = self[index], None
            yield value

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
