"""gradients.safetensors: a statistic of the dense model's gradients, a tensor [out, in] for each layer, by its name.

The metadata are `format`, `version`, and `about` (json: statistic, samples, and the facts of model, with its digest,
and calibration). The file is written and read one tensor at a time, so it may be larger than memory.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.store.files import parse_json, write_atomic
from billhook.store.shards import Shard, read_shard
from billhook.store.typed_json import typed

FORMAT = "billhook gradients"
VERSION = "1"
Shape = tuple[int, int]
_KINDS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_CODES = {torch.float32: "F32", torch.float16: "F16"}


@dataclass(frozen=True, eq=False)
class Gradients(Mapping[str, Tensor]):
    """Layer name -> float32 [out, in], read from the file on access; `about` is its metadata."""

    path: Path
    about: dict[str, Any]
    shard: Shard

    def __getitem__(self, name: str) -> Tensor:
        entry = self.shard.entries[name]
        values = np.fromfile(self.path, _KINDS[entry.dtype], math.prod(entry.shape), offset=entry.start)
        return torch.from_numpy(values).view(entry.shape).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shard.entries)

    def __len__(self) -> int:
        return len(self.shard.entries)

    @property
    def statistic(self) -> str:
        """The name of the statistic, such as gradient_l1."""
        return str(self.about["statistic"])

    def check(self, statistic: str, shapes: Mapping[str, Shape], model: Mapping[str, Any] | None = None) -> None:
        """Raise BillhookError unless the file holds `statistic` for every layer of `shapes` and comes from `model`.

        `model` are the facts of a model (name, digest); an unknown digest (a model in memory) is not compared.
        """
        made = self.about.get("model")
        made = made if isinstance(made, dict) else {}
        again = "Make the file again: billhook gradients MODEL --calibration SOURCE -o FILE."
        if model and model.get("digest") and made.get("digest") and model["digest"] != made["digest"]:
            other = f"{made.get('name', 'another model')}, whose weights are not those of"
            raise BillhookError(f"{self.path} holds gradients of {other} {model.get('name', 'this model')}. {again}")
        if statistic != self.statistic:
            both = f"{self.path} holds {self.statistic}, and the criterion reads {statistic}"
            raise BillhookError(f"{both}: give billhook gradients the same --norm and --mode as the criterion.")
        for name, shape in shapes.items():
            if name not in self:
                raise BillhookError(f"{self.path} has no gradients of {name}. {again}")
            found = self.shard.entries[name].shape
            if found != tuple(shape):
                sizes = f"{' x '.join(map(str, found))} gradients for {name}, which is {shape[0]} x {shape[1]}"
                raise BillhookError(f"{self.path} has {sizes}. {again}")


def open_gradients(path: Path) -> Gradients:
    """Open a gradients file; raises BillhookError if it is missing, damaged, truncated or of another kind."""
    if not path.is_file():
        make = f"billhook gradients MODEL --calibration SOURCE -o {path}"
        raise BillhookError(f"There is no gradients file at {path}. Make one: {make}")
    shard = read_shard(path)
    metadata = json.loads(shard.header[8:]).get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise BillhookError(f"{path} is not a gradients file: it is a safetensors file of another kind.")
    if metadata.get("version") != VERSION:
        raise BillhookError(f"{path} has version {metadata.get('version')!r}; this Billhook reads version {VERSION}.")
    try:
        about = typed({"statistic": str}, parse_json(metadata["about"]), str(path))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise BillhookError(f"{path} is a damaged gradients file: its metadata lack the statistic.") from None
    for entry in shard.entries.values():
        if entry.dtype not in _KINDS or len(entry.shape) != 2:
            what = f"{entry.name} is {entry.dtype} {list(entry.shape)}"
            raise BillhookError(f"{path} is a damaged gradients file: {what}.")
    return Gradients(path, about, shard)


def write_gradients(
    path: Path,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    about: Mapping[str, Any],
    values: Callable[[], Iterator[tuple[str, Tensor]]],
) -> None:
    """Write, atomically, the tensors of `dtype` that `values` yields by name: each of `shapes` once, in any order."""
    metadata = {"format": FORMAT, "version": VERSION, "about": json.dumps(about, sort_keys=True)}
    header: dict[str, Any] = {"__metadata__": metadata}
    position, kind = 0, _KINDS[_CODES[dtype]]
    for name, shape in shapes.items():
        size = math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, value in values():
                assert (tuple(value.shape), value.dtype) == (tuple(shapes[name]), dtype), name
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(value.contiguous().cpu().numpy().astype(kind, copy=False).data)
            assert os.fstat(file.fileno()).st_size <= 8 + len(text) + position

    write_atomic(path, write)
