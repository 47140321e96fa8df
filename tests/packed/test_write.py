"""Pack and unpack: every byte is restored, and the size is what the format promises."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from command import billhook as command
from command import done, listing
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from sparse_models import directory, prune_at_random, sparse

import billhook
from billhook import BillhookError, pack, unpack
from billhook.packed.format import open_packed
from billhook.store.layout import PACKED
from billhook.store.shards import read_shard


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "mixtral", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gpt_oss", "qwen2"))],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("negative", [False, True], ids=["zeros", "signed zeros"])
def test_every_byte_is_restored(family: str, dtype: torch.dtype, negative: bool, tmp_path: Path) -> None:
    source = tmp_path / "model"
    prune_at_random(build(family), negative=negative).to(dtype).save_pretrained(source, max_shard_size="60KB")
    (source / "notes").mkdir()
    (source / "notes" / "license.txt").write_text("free")
    (source / ".gitattributes").write_text("*.safetensors binary")
    report = pack(source, tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*.packed.safetensors"))) == len(list(source.glob("*.safetensors"))) > 1
    assert report.packed_bytes < report.dense_bytes
    assert report.error == 0
    assert listing(unpack(tmp_path / "packed", tmp_path / "dense")) == listing(source)


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    """Compared bit by bit in plain loops."""
    weight = sparse(5, 70, 0.7)
    source = directory(tmp_path / "model", {"a.weight": weight, "norm": torch.ones(3)})
    pack(source, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.packed.safetensors")
    assert stored["norm"].equal(torch.ones(3))
    assert stored["a.weight.bitmask"].shape == (5, 16)
    values = []
    for i in range(5):
        for j in range(128):
            bit = int(stored["a.weight.bitmask"][i, j // 8]) >> j % 8 & 1
            assert bit == (j < 70 and weight[i, j] != 0)
            if bit:
                values.append(weight[i, j])
    assert stored["a.weight.values"].dtype == torch.bfloat16
    assert stored["a.weight.values"].tolist() == [*torch.stack(values).tolist(), *[0.0] * 32]


def test_transposed_layers_are_recognized(tmp_path: Path) -> None:
    """GPT-2's are known by the model type, others by billhook.json."""
    weight = sparse(40, 96, 0.7)
    pack(directory(tmp_path / "gpt2", {"h.0.attn.c_attn.weight": weight}, model_type="gpt2"), tmp_path / "a")
    facts = open_packed(tmp_path / "a").matrices["h.0.attn.c_attn.weight"]
    assert (facts.transposed, facts.rows, facts.columns) == (True, 96, 40)
    other = directory(tmp_path / "other", {"x.weight": weight}, model_type="new")
    (other / "billhook.json").write_text(json.dumps({"layers": {"x": {"tensor": "x.weight", "transposed": True}}}))
    pack(other, tmp_path / "b")
    assert open_packed(tmp_path / "b").matrices["x.weight"].transposed
    for packed, source in (("a", "gpt2"), ("b", "other")):
        assert listing(unpack(tmp_path / packed, tmp_path / f"{packed}-dense")) == listing(tmp_path / source)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(512, 512), (384, 1408), (1000, 576)])
def test_the_size_is_what_is_promised(sparsity: float, shape: tuple[int, int], tmp_path: Path) -> None:
    """(1 - sparsity) + 1/16 of the dense bfloat16 layer, and 1 %."""
    weight = sparse(*shape, sparsity)
    zeros = float((weight == 0).float().mean())
    pack(directory(tmp_path / "model", {"w": weight}), tmp_path / "packed")
    shard = read_shard(tmp_path / "packed" / "model.packed.safetensors")
    used = sum(entry.stop - entry.start for entry in shard.entries.values())
    assert used <= 1.01 * (1 - zeros + 1 / 16) * 2 * weight.numel()
    assert (tmp_path / "packed" / "model.packed.safetensors").stat().st_size <= used + 400


def test_signed_zeros_cost_a_bit_each_and_no_value(tmp_path: Path) -> None:
    keep = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) >= 0.7
    weight = (torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * keep).bfloat16()
    pack(directory(tmp_path / "model", {"w": weight}), tmp_path / "packed")
    facts = open_packed(tmp_path / "packed").matrices["w"]
    assert facts.nnz == int((weight != 0).sum())
    assert facts.negative_zeros == int(((weight == 0) & weight.signbit()).sum()) > 20000
    few = weight.abs()
    few[3, 4] = -0.0
    pack(directory(tmp_path / "few", {"w": few}), tmp_path / "packed-few")
    facts = open_packed(tmp_path / "packed-few").matrices["w"]
    assert (facts.nnz, facts.negative_zeros) == (int((few != 0).sum()) + (few[3, 4] == 0), 0)


def test_tensors_that_would_not_shrink_stay_dense(tmp_path: Path) -> None:
    tensors = {
        "sparse": sparse(64, 64, 0.5),
        "little": sparse(64, 64, 0.02),
        "vector": torch.zeros(4096),
        "whole": torch.zeros(64, 64, dtype=torch.int32),
        "double": torch.zeros(64, 64, dtype=torch.float64),
        "empty": torch.zeros(0, 64),
        "taken": sparse(64, 64, 0.5),
        "taken.values": torch.zeros(3),
    }
    report = pack(directory(tmp_path / "model", tensors), tmp_path / "packed")
    assert list(report.layers) == ["sparse"]
    assert report.dense == 7
    assert listing(unpack(tmp_path / "packed", tmp_path / "dense")) == listing(tmp_path / "model")


def test_tensors_are_aligned_and_masks_stand_first(tmp_path: Path) -> None:
    tensors = {
        "b": torch.ones(3, dtype=torch.uint8),
        "w": sparse(9, 70, 0.6),
        "x": sparse(7, 65, 0.9, torch.float32),
        "n": torch.ones(5),
    }
    source = directory(tmp_path / "model", tensors)
    pack(source, tmp_path / "packed")
    entries = list(read_shard(tmp_path / "packed" / "model.packed.safetensors").entries.values())
    assert {entry.name for entry in entries[:2]} == {"w.bitmask", "x.bitmask"}
    items = {"U8": 1, "BF16": 2, "F32": 4}
    for entry in entries:
        assert entry.start % (8 if entry.name.endswith("bitmask") else items[entry.dtype]) == 0
    with safe_open(tmp_path / "packed" / "model.packed.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 140),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape_is_restored(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, sparsity: float, dtype: Any, seed: int
) -> None:
    """Special values too: NaN, infinity, the smallest numbers, zeros of either sign."""
    folder = tmp_path_factory.mktemp("any")
    weight = sparse(rows, columns, sparsity, torch.float32, seed)
    special = torch.tensor([-0.0, float("nan"), float("inf"), -1e-40, 1e-45, 6e-8])
    for number in range(seed % 5):
        weight[number * 7 % rows, number * 31 % columns] = special[(seed + number) % len(special)]
    source = directory(
        folder / "model", {"big": torch.zeros(64, 64), "w": weight.to(dtype), "t": torch.zeros(3, 2, columns)}
    )
    pack(source, folder / "packed")
    assert listing(unpack(folder / "packed", folder / "dense")) == listing(source)
    shutil.rmtree(folder)


@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_reported_error_of_int8_is_that_of_rounding(group: int | None, transposed: bool, tmp_path: Path) -> None:
    weight = sparse(20, 200, 0.5, torch.float32)
    weight[3] = 0
    weight[4, 7] = 50.0  # an outlier makes the rest of its row, or group, coarse
    stored = weight.T.contiguous() if transposed else weight
    source = directory(
        tmp_path / "model", {"h.0.mlp.c_fc.weight": stored}, model_type="gpt2" if transposed else "llama"
    )
    report = pack(source, tmp_path / "packed", values="int8", group=group)
    back = load_file(unpack(tmp_path / "packed", tmp_path / "dense") / "model.safetensors")["h.0.mlp.c_fc.weight"]
    back = back.T if transposed else back
    expected = weight.clone()
    for i in range(20):
        for start in range(0, 200, group or 200):
            part = weight[i, start : start + (group or 200)]
            scale = part.abs().max() / 127
            if scale > 0:
                expected[i, start : start + (group or 200)] = (part / scale).round() * scale
    torch.testing.assert_close(back, expected, rtol=1e-6, atol=0)
    error = float((back.double() - weight).norm() / weight.double().norm())
    assert report.error == pytest.approx(error, rel=1e-3)
    assert report.layers["h.0.mlp.c_fc.weight"]["error"] == pytest.approx(error, rel=1e-3)
    assert bool(((back == 0) >= (weight == 0)).all())


def test_signed_zeros_and_dense_tensors_are_packed_as_int8(tmp_path: Path) -> None:
    """Zeros stay zeros whatever their sign; a tensor without zeros is not rounded just because int8 is smaller."""
    keep = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) >= 0.6
    weight = (torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * keep).bfloat16()
    dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    pack(directory(tmp_path / "model", {"w": weight, "d": dense}), tmp_path / "packed", values="int8")
    back = load_file(unpack(tmp_path / "packed", tmp_path / "dense") / "model.safetensors")
    assert back["d"].equal(dense)
    assert back["w"][~keep].view(torch.int16).equal(weight[~keep].view(torch.int16))
    assert float((back["w"].float() - weight.float()).norm() / weight.float().norm()) < 0.02


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model", prune_at_random(tiny.llama()))
    for name in ("a", "b"):
        pack(source, tmp_path / name)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


def test_pruning_straight_into_a_packed_directory(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    how = ("--sparsity", 0.5, "--criterion", "magnitude")
    done("prune", source, *how, "-o", tmp_path / "pruned")
    done("pack", tmp_path / "pruned", "-o", tmp_path / "packed")
    report = billhook.prune(source, sparsity=0.5, criterion="magnitude", output=tmp_path / "direct", pack=True)
    assert report.output == tmp_path / "direct"
    assert listing(tmp_path / "direct") == listing(tmp_path / "packed")
    done("prune", source, *how, "-o", tmp_path / "direct", "--pack", "--overwrite")
    assert listing(tmp_path / "direct") == listing(tmp_path / "packed")
    assert sorted(os.listdir(tmp_path)) == ["direct", "model", "packed", "pruned"]


def test_a_pruned_model_that_cannot_be_packed_is_kept(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    ran = command("prune", source, "--sparsity", 0.001, "--criterion", "magnitude", "-o", tmp_path / "out", "--pack")
    assert ran.code == 2
    assert "packing would not make it smaller" in ran.err
    assert f"The pruned model is in {tmp_path / 'out.dense'}" in ran.err
    assert billhook.verify(tmp_path / "out.dense").ok
    before = listing(tmp_path / "out.dense")
    with pytest.raises(
        BillhookError, match=r"out\.dense exists"
    ):  # it may be somebody's model, whatever --overwrite says of out
        billhook.prune(source, sparsity=0.5, criterion="magnitude", output=tmp_path / "out", pack=True, overwrite=True)
    assert listing(tmp_path / "out.dense") == before
    with pytest.raises(BillhookError, match="or is inside it"):
        billhook.prune(source, sparsity=0.5, criterion="magnitude", output=source, pack=True, overwrite=True)


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Packing and unpacking 256 MiB in one tensor takes hardly more memory of its own than 16 MiB; mapped pages of
    files apart."""
    code = (
        "import sys, threading, time, torch\n"
        "from billhook import pack, unpack\n"
        "torch.set_num_threads(1)\n"
        "def own(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        "most, done = [own()], False\n"
        "def watch():\n"
        "    while not done:\n"
        "        most[0] = max(most[0], own()); time.sleep(0.01)\n"
        "thread = threading.Thread(target=watch); before = own(); thread.start()\n"
        "pack(sys.argv[1], sys.argv[2]); unpack(sys.argv[2], sys.argv[3])\n"
        "done = True; thread.join(); print(1024 * (most[0] - before))\n"
    )
    peak = {}
    for name, rows in (("small", 4096), ("large", 65536)):
        weight = torch.zeros(rows, 2048, dtype=torch.bfloat16)
        weight[:, ::3] = 1.5
        source = directory(tmp_path / name, {"w": weight})
        del weight
        places = [str(tmp_path / f"{name}-{what}") for what in ("packed", "dense")]
        ran = subprocess.run(
            [sys.executable, "-c", code, str(source), *places], capture_output=True, text=True, check=True
        )
        peak[name] = int(ran.stdout)
    assert peak["large"] < peak["small"] + 200 * 2**20


def test_the_digest_of_a_record_is_as_documented(tmp_path: Path) -> None:
    pack(directory(tmp_path / "model", {"w": torch.zeros(64, 64), "ö": torch.zeros(2)}), tmp_path / "packed")
    record = json.loads((tmp_path / "packed" / PACKED).read_text())
    compact = json.dumps({k: v for k, v in record.items() if k != "digest"}, sort_keys=True, separators=(",", ":"))
    assert record["digest"] == hashlib.sha256(compact.encode()).hexdigest()
    assert np.array_equal(list(record["tensors"]), ["w.bitmask", "w.values", "ö"])
