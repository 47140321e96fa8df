"""Models that cannot be packed or unpacked: the error says why, and nothing is left behind."""

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import listing
from sparse_models import directory, prune_at_random, sparse

from billhook import BillhookError, JobError, pack, unpack
from billhook.steps import pack as step
from billhook.store.layout import PACKED


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    with pytest.raises(
        BillhookError, match=r"model is a dense model \(the most zeros are in .*%\): packing would not make it smaller"
    ):
        pack(source, tmp_path / "packed")
    assert os.listdir(tmp_path) == ["model"]


def test_weights_of_a_dtype_that_cannot_be_packed_are_named(tmp_path: Path) -> None:
    source = directory(tmp_path / "model", {"w": torch.zeros(64, 64, dtype=torch.float64)})
    with pytest.raises(
        BillhookError, match="holds F64 weights, and only BF16, F16, F32 can be packed: convert the model"
    ):
        pack(source, tmp_path / "packed")


def test_a_quantized_a_packed_and_an_empty_directory_are_refused(tmp_path: Path) -> None:
    source = directory(tmp_path / "q", {"w": torch.zeros(64, 64)}, quantization_config={"bits": 4})
    with pytest.raises(BillhookError, match=r"q is a quantized checkpoint: start from the unquantized model"):
        pack(source, tmp_path / "out")
    pack(directory(tmp_path / "model", {"w": torch.zeros(64, 64)}), tmp_path / "packed")
    with pytest.raises(
        BillhookError,
        match=r"packed is packed already. To pack it differently, unpack it first: billhook unpack .*packed",
    ):
        pack(tmp_path / "packed", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BillhookError, match=r"empty has no config\.json"):
        pack(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(BillhookError, match=r"empty has no model\.safetensors"):
        pack(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "billhook.unfinished.json").write_text("{}")
    with pytest.raises(BillhookError, match="empty is not finished: resume it"):
        pack(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(BillhookError, match=r"model is not a packed model: it has no billhook_packed\.json"):
        unpack(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int4"}, "Unknown values 'int4': use stored or int8"),
        ({"group": 64}, "group=64: a group of int8 values .*with values int8 only"),
        ({"values": "int8", "group": 32}, "group=32: .* is 64, 128, 256"),
        ({"values": "int8", "group": 96}, "group=96"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match=message):
        pack(directory(tmp_path / "model", {"w": torch.zeros(64, 64)}), tmp_path / "out", **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_int8_cannot_hold_are_refused(bad: float, tmp_path: Path) -> None:
    weight = sparse(64, 64, 0.5)
    weight[1, 1] = bad
    with pytest.raises(BillhookError, match="w holds NaN or infinity, which int8 cannot hold"):
        pack(directory(tmp_path / "model", {"w": weight}), tmp_path / "out", values="int8")
    assert os.listdir(tmp_path) == ["model"]


def test_other_weights_are_left_out_and_named(tmp_path: Path) -> None:
    source = directory(tmp_path / "model", {"w": torch.zeros(64, 64)})
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"graph")
    report = pack(source, tmp_path / "packed")
    assert report.notes == [
        f"{n} holds weights outside the checkpoint and was left out." for n in ("onnx/model.onnx", "pytorch_model.bin")
    ]
    assert sorted(os.listdir(tmp_path / "packed")) == [PACKED, "config.json", "model.packed.safetensors"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save(tmp_path / "model", prune_at_random(tiny.llama()))
    pack(source, tmp_path / "packed")
    before = listing(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_file", "copy_files", "write_record"):
        with monkeypatch.context() as patch:
            patch.setattr(step, name, full)
            with pytest.raises(JobError, match="The disk is full"):
                pack(source, tmp_path / "packed", overwrite=True)
        assert listing(tmp_path) == before


def test_an_output_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    source = directory(tmp_path / "model", {"w": torch.zeros(64, 64)})
    pack(source, tmp_path / "packed")
    with pytest.raises(
        BillhookError, match=r"packed exists and is not empty: choose another, or allow replacing it \(overwrite=True\)"
    ):
        pack(source, tmp_path / "packed")
    pack(source, tmp_path / "packed", overwrite=True)
    with pytest.raises(BillhookError, match="or is inside it"):
        unpack(tmp_path / "packed", tmp_path / "packed", overwrite=True)
