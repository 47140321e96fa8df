"""Read packed files: those of earlier versions, and damaged or hostile ones, which give the same result or a
BillhookError."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import listing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import DATA
from safetensors.torch import save_file
from sparse_models import directory, prune_at_random, sparse
from tiny import llama, save

from billhook import BillhookError, load, pack, unpack, verify
from billhook.packed.format import digest
from billhook.packed.generation import generate
from billhook.store.layout import PACKED

SHARD = "model.packed.safetensors"


@pytest.mark.parametrize(
    ("name", "sha256", "tokens"),
    [
        (
            "packed_v1_stored",
            "1a52a775e420f61e5fe51814738eae7749fec5c28793144fe65a21fe8020e849",
            [9, 53, 62, 15, 31, 41, 37, 13, 47, 29, 44, 29],
        ),
        (
            "packed_v1_int8",
            "cb084b25a6ae528fe759b58bcdeb57cfb3b95bd734e8b82df7b2c1b81b77338e",
            [55, 62, 27, 51, 11, 50, 8, 61, 0, 11, 50, 8],
        ),
    ],
)
def test_files_written_by_version_0_1_0_are_read(name: str, sha256: str, tokens: list[int], tmp_path: Path) -> None:
    """They verify, load, generate and unpack: bfloat16 with a billhook.json; int8 with groups of columns and signs."""
    assert verify(DATA / name).ok
    dense = unpack(DATA / name, tmp_path / "dense")
    assert hashlib.sha256((dense / "model.safetensors").read_bytes()).hexdigest() == sha256
    prompt = torch.arange(8, 16)[None]
    assert generate(load(DATA / name, tune=False), prompt, len(tokens)).ids.tolist() == [[*range(8, 16), *tokens]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed directories that use the whole format: values of 2 and 4 bytes, int8, signs, transposed layers, dense
    tensors, other files."""
    folder = tmp_path_factory.mktemp("packed")
    negative = sparse(12, 100, 0.7)
    negative[sparse(12, 100, 0.5, seed=3) == 0] *= -0.0
    tensors = {
        "a": sparse(9, 70, 0.6),
        "h.0.mlp.c_fc.weight": sparse(33, 8, 0.8, torch.float32),
        "n": negative,
        "d": torch.ones(2, 3),
    }
    source = directory(folder / "model", tensors, model_type="gpt2")
    (source / "tokenizer.json").write_text("{}")
    pack(source, folder / "packed")
    pack(source, folder / "int8", values="int8", group=64)
    return folder


@pytest.fixture
def edit(packed: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the packed directory after `change(record)`, with a valid checksum, as an attacker would make it."""

    def edited(change: Callable[[dict[str, Any]], object]) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(packed / "packed", copy)
        record = json.loads((copy / PACKED).read_text())
        change(record)
        (copy / PACKED).write_text(json.dumps(record | {"digest": digest(record)}))
        return copy

    return edited


def refused(path: Path, match: str) -> None:
    """Every reader raises the error, and verify reports it."""
    with pytest.raises(BillhookError, match=match):
        unpack(path, path.with_name("out"))
    assert not path.with_name("out").exists()
    found = verify(path)
    assert not found.ok


def test_versions_sizes_and_checksums(packed: Path, tmp_path: Path, edit: Callable[..., Path]) -> None:
    refused(
        edit(lambda record: record.update(version=2)),
        r"billhook_packed\.json has version 2; this Billhook reads version 1",
    )
    shutil.rmtree(tmp_path / "edited")
    copy = shutil.copytree(packed / "packed", tmp_path / "copy")
    data = bytearray((copy / SHARD).read_bytes())
    (copy / SHARD).write_bytes(data[:-1])
    refused(copy, r"model\.packed\.safetensors is not \d+ bytes long")
    data[-200] ^= 1
    (copy / SHARD).write_bytes(data)
    refused(copy, r"the bytes of .* are not those that were written, its checksum differs")
    (copy / SHARD).unlink()
    refused(copy, "Cannot read the weights")
    shutil.copy(packed / "packed" / SHARD, copy)
    text = (copy / PACKED).read_text()
    (copy / PACKED).write_text(text.replace('"nnz": ', '"nnz": 1'))
    refused(copy, "was changed after it was written")
    (copy / PACKED).write_text(text[: len(text) // 2])
    refused(copy, "not valid json")
    (copy / PACKED).write_text(text)
    (copy / "tokenizer.json").write_text("{ }")
    refused(copy, r"tokenizer\.json is not the file that was packed")
    (copy / "tokenizer.json").unlink()
    refused(copy, r"tokenizer\.json is missing")


def test_a_bitmask_that_disagrees_with_the_values_is_refused(
    packed: Path, tmp_path: Path, edit: Callable[..., Path]
) -> None:
    """With valid checksums, so that the disagreement itself is found."""

    def flip(bit: int) -> Path:
        def change(record: dict[str, Any]) -> None:
            path = tmp_path / "edited" / SHARD
            data = bytearray(path.read_bytes())
            start = 8 + int.from_bytes(data[:8], "little")
            offset = json.loads(data[8:start])["a.bitmask"]["data_offsets"]
            data[start + offset[0] + bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            import zlib

            record["tensors"]["a.bitmask"] = zlib.crc32(bytes(data[start + offset[0] : start + offset[1]]))

        return edit(change)

    refused(flip(3), r"a: the bitmask keeps \d+ weights, there are \d+ values")
    shutil.rmtree(tmp_path / "edited")
    refused(flip(71), "a: A bitmask of 70 columns keeps weights beyond the last column")


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nnz": (lambda r: r["layers"]["a"].update(nnz=7), r"a\.values is BF16 \[\d+\], expected BF16 \[39\]"),
    "huge nnz": (lambda r: r["layers"]["a"].update(nnz=2**70), "not a record of a packed model"),
    "negative nnz": (lambda r: r["layers"]["a"].update(nnz=-1), "not a record of a packed model"),
    "nnz in words": (lambda r: r["layers"]["a"].update(nnz="7"), "not a record of a packed model"),
    "absurd shape": (lambda r: r["layers"]["a"].update(shape=[2**40, 2**40]), "a is not the BF16 tensor"),
    "shape of nothing": (lambda r: r["layers"]["a"].update(shape=[0, 70]), "not a record of a packed model"),
    "shape of one": (lambda r: r["layers"]["a"].update(shape=[630]), "not a record of a packed model"),
    "another shape": (
        lambda r: r["layers"]["a"].update(shape=[70, 9]),
        r"a is not the BF16 tensor \[9, 70\] of the dense file",
    ),
    "turned": (
        lambda r: r["layers"]["a"].update(transposed=True),
        r"a\.bitmask is U8 \[9, 16\], expected U8 \[70, 8\]",
    ),
    "turned maybe": (lambda r: r["layers"]["a"].update(transposed=1), "not a record of a packed model"),
    "another dtype": (lambda r: r["layers"]["a"].update(dtype="F16", values="F16"), "a is not the BF16 tensor"),
    "int8": (lambda r: r["layers"]["a"].update(values="I8"), "a.scales is not there"),
    "group": (lambda r: r.update(group=48), "not a record of a packed model"),
    "no layers": (lambda r: r.update(layers={}), "not a record of a packed model"),
    "one layer more": (lambda r: r["layers"].update(z=r["layers"]["a"]), "z is in no file"),
    "one layer less": (lambda r: r["layers"].pop("a"), "a is not there, expected BF16"),
    "no checksum": (lambda r: r["tensors"].pop("a.values"), r"no checksum of a\.values"),
    "signs": (lambda r: r["layers"]["a"].update(negative_zeros=1), r"a\.signs is not there"),
    "outside": (lambda r: r["shards"]["model.safetensors"].update(file="../x.safetensors"), "not a plain file name"),
    "target outside": (lambda r: r.update(shards={"../x": r["shards"]["model.safetensors"]}), "not a plain file name"),
    "other file outside": (lambda r: r["files"].update({"../../etc/passwd": "0"}), "not a record of a packed model"),
    "header": (lambda r: r["shards"]["model.safetensors"].update(header="{"), "damaged safetensors header"),
    "header with a hole": (
        lambda r: r["shards"]["model.safetensors"].update(
            header='{"a":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}}'
        ),
        "damaged safetensors header at a",
    ),
    "no header": (lambda r: r["shards"]["model.safetensors"].pop("header"), "not a record of a packed model"),
    "no shards": (lambda r: r.update(shards={}), "is in no file"),
    "a list": (lambda r: r.update(layers=[1]), "not a record of a packed model"),
    "another sha256": (
        lambda r: r["shards"]["model.safetensors"].update(sha256="0"),
        "does not give the file that was packed",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_record_is_refused(name: str, edit: Callable[..., Path]) -> None:
    change, match = CHANGES[name]
    refused(edit(change), match)


def mutate(data: bytes, draw: Callable[..., Any]) -> bytes:
    """Flip a bit, overwrite, cut, add or remove bytes anywhere."""
    kind = draw(st.sampled_from(["flip", "flip", "set", "cut", "add", "remove"]))
    at = draw(st.integers(0, len(data) - 1))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    some = draw(st.binary(min_size=1, max_size=9))
    return {
        "set": data[:at] + some + data[at + len(some) :],
        "cut": data[:at],
        "add": data[:at] + some + data[at:],
    }.get(kind, data[:at] + data[at + len(some) :])


@pytest.mark.gate
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), form=st.sampled_from(["packed", "int8"]))
def test_any_changed_byte_of_a_packed_file_gives_the_same_result_or_an_error(
    packed: Path, tmp_path: Path, data: st.DataObject, form: str
) -> None:
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(tmp_path / "dense", ignore_errors=True)
    shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    shutil.copytree(packed / form, folder)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    for _ in range(data.draw(st.integers(1, 3))):
        (folder / name).write_bytes(mutate((folder / name).read_bytes() or b"\0", data.draw))
    try:
        unpack(folder, tmp_path / "dense")
    except BillhookError:
        assert not (tmp_path / "dense").exists()
        return
    assert listing(tmp_path / "dense") == listing(unpack(packed / form, tmp_path / "whole"))
    assert verify(folder).problems == verify(packed / form).problems


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_record_of_a_packed_file_gives_the_same_result_or_an_error(
    packed: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """One value anywhere in the record changes, with a valid checksum: an error or some model, never a crash."""
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(tmp_path / "dense", ignore_errors=True)
    shutil.copytree(packed / data.draw(st.sampled_from(["packed", "int8"])), folder)
    record = json.loads((folder / PACKED).read_text())
    place: Any = record
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 5)) == 0:
            break
        place = place[key]
    whole = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 63, 64, 65, 2**31, 2**63])
    place[key] = data.draw(
        whole | st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just([]) | st.just({})
    )
    (folder / PACKED).write_text(json.dumps(record | {"digest": digest(record)}))
    try:
        unpack(folder, tmp_path / "dense")
    except BillhookError:
        assert not (tmp_path / "dense").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_loading_gives_the_same_model_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, logits = model_of(tmp_path_factory)
    fuzzed = folder.with_name("fuzzed")
    shutil.rmtree(fuzzed, ignore_errors=True)
    shutil.copytree(folder, fuzzed)
    name = data.draw(st.sampled_from([PACKED, SHARD, "config.json", "generation_config.json"]))
    (fuzzed / name).write_bytes(mutate((fuzzed / name).read_bytes(), data.draw))
    try:
        model = load(fuzzed, tune=False)
    except BillhookError:
        return
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.equal(logits)


_MODEL: list[Any] = []


def model_of(factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A packed model of two blocks and its logits, made once."""
    if not _MODEL:
        folder = factory.mktemp("model")
        pack(save(folder / "dense", prune_at_random(llama(num_hidden_layers=2)), words=False), folder / "packed")
        with torch.no_grad():
            _MODEL.extend([folder / "packed", load(folder / "packed", tune=False)(torch.arange(8)[None]).logits])
    return _MODEL[0], _MODEL[1]


def test_verification_finds_weights_added_to_a_packed_model(packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed / "packed", tmp_path / "copy")
    save_file({"w": torch.ones(1)}, copy / "model.safetensors")
    assert "model.safetensors holds weights and does not belong to the packed model." in verify(copy).problems
