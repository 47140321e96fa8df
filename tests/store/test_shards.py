"""Safetensors files byte by byte: zeros and values that are not finite as torch sees them, wrong headers, copies."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from billhook.errors import BillhookError
from billhook.store import shards
from billhook.store.shards import lay_out, layer_zeros, put, read_shard

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def every_kind(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits, and among them both zeros, the smallest numbers and powers of two; no NaN and no infinity."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(-(2**15), 2**15, (math.prod(shape) * dtype.itemsize // 2,), generator=generator)
    values = raw.to(torch.int16).view(dtype)
    values[~values.isfinite()] = 1.5
    tiny = torch.tensor([1, 2, 3], dtype=BITS[dtype.itemsize]).view(dtype)
    special = torch.cat([torch.tensor([0.0, -0.0, 2.0, -2.0, 4.0, 0.5]).to(dtype), tiny, -tiny])
    values[:: len(values) // 40][: len(special)] = special
    return values.view(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_those_of_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": every_kind(dtype, (16, 24)), "experts": every_kind(dtype, (3, 8, 16)), "none": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    shard = read_shard(tmp_path / "model.safetensors")
    for name, value in tensors.items():
        assert np.array_equal(shard.zeros(shard.entries[name]), (value == 0).numpy())
    for expert, value in enumerate(tensors["experts"]):
        assert np.array_equal(shard.zeros(shard.entries["experts"], expert), (value == 0).numpy())
        place = {"tensor": "experts", "index": expert, "transposed": True}
        (found,) = layer_zeros(place, (16, 8), [shard]) or ()
        assert np.array_equal(found, (value == 0).numpy().T)
    pieces = {"pieces": [{"tensor": "a", "rows": [2, 7]}, {"tensor": "a", "rows": [0, 1]}]}
    found = layer_zeros(pieces, (6, 24), [shard])
    assert found is not None
    assert np.array_equal(np.concatenate(found), (torch.cat([tensors["a"][2:7], tensors["a"][:1]]) == 0).numpy())
    assert layer_zeros(pieces, (7, 24), [shard]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    dtype: torch.dtype, bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_CHUNK", 64)
    good = every_kind(dtype, (65,))  # one more than whole chunks
    for position in (None, 0, 31, 32, 64):
        value = good.clone()
        if position is not None:
            value[position] = bad
        save_file({"first": good, "value": value}, tmp_path / "model.safetensors")
        shard = read_shard(tmp_path / "model.safetensors")
        assert shard.finite(shard.entries["first"])
        assert shard.finite(shard.entries["value"]) == (position is None)


def write(path: Path, header: dict[str, Any], size: int) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 16, [4]), "b": entry(8, 24, [4])},  # the second overlaps the first, and ends with the file
        {"a": entry(0, 24, [6]), "b": entry(16, 24, [2])},  # the second lies in the first
        {"a": entry(0, 8, [2]), "b": entry(16, 24, [2])},  # a gap
        {"a": entry(8, 24, [4])},  # a gap at the beginning
        {"a": entry(0, 16, [4])},  # the end is missing
        {"a": entry(0, 32, [8])},  # more than the file has
        {"a": entry(0, 24, [5])},  # a shape of fewer bytes
        {"a": entry(0, 24, [7])},  # a shape of more bytes
        {"a": entry(0, 24, [-2, -3])},
        {"a": entry(0, 2**63, [2**61])},
        {"a": entry(24, 0, [6])},
        {"a": entry(0, 24, [6], "F31")},
    ],
    ids=str,
)
def test_headers_that_are_wrong_in_one_place_are_refused(header: dict[str, Any], tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", {"b": entry(16, 24, [2]), "a": entry(0, 16, [4])}, 24)
    assert list(read_shard(good).entries) == ["a", "b"]
    with pytest.raises(BillhookError, match=r"bad\.safetensors.*copy or download it again"):
        read_shard(write(tmp_path / "bad.safetensors", header, 24))


def test_copies_have_the_layout_the_chosen_values_and_zeros_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_CHUNK", 7)
    tensors = {name: torch.arange(1.0, 12) * scale for name, scale in (("a", 1), ("b", 10), ("c", 100))}
    save_file(tensors, tmp_path / "source.safetensors", {"format": "pt"})
    shard = read_shard(tmp_path / "source.safetensors")
    lay_out(shard, tmp_path / "target.safetensors", lambda name: name != "b")
    target = tmp_path / "target.safetensors"
    assert read_shard(target).header == shard.header
    assert {name: value.tolist() for name, value in load_file(target).items()} == {
        name: [0.0] * 11 if name == "b" else value.tolist() for name, value in tensors.items()
    }


def test_a_write_that_the_system_does_in_parts_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shards.os.pwrite
    monkeypatch.setattr(shards.os, "pwrite", lambda file, data, position: real(file, data[:3], position))
    with open(tmp_path / "file", "wb", buffering=0) as file:
        put(file.fileno(), 2, b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"\0\0" + b"0123456789"
