"""An importance matrix file of llama.cpp in the place of text, in both of its forms."""

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from command import billhook, done
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from billhook.errors import BillhookError
from billhook.export.imatrix import read_imatrix
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.grids import grid_of
from billhook.methods.statistics import LayerStats
from billhook.packed.loading import load
from billhook.steps.quantize import quantize
from billhook.steps.verify import verify

pytestmark = pytest.mark.gate


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, calibration tokens, and the model's importance matrix in both forms."""
    folder = tmp_path_factory.mktemp("imatrix")
    tiny.save(folder / "model", tiny.llama(num_hidden_layers=2, intermediate_size=64))
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": ids}, folder / "tokens.safetensors")
    text = ("--calibration", folder / "tokens.safetensors", "--samples", "4", "--length", "32")
    done("imatrix", folder / "model", "-o", folder / "new.gguf", *text)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "new.gguf").tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    data = struct.pack("<i", len(names))
    for name in names:
        values = (tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"] * 7).astype(np.float32)
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 7, values.size) + values.tobytes()
    (folder / "old.dat").write_bytes(data + struct.pack("<ii", 4, 4) + b"text")
    return folder


@pytest.mark.parametrize(("file", "type"), [("new.gguf", "int3/16"), ("old.dat", "q4_0")])
def test_columns_are_weighed_by_their_squared_inputs(place, tmp_path, file, type):
    report = quantize(place / "model", type, tmp_path / "out", imatrix=place / file, quantizer="round")
    dense, found = load(place / "model").state_dict(), _weights(report.output)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(place / "new.gguf").tensors}
    for key, name in {"attn_q": "self_attn.q_proj", "ffn_up": "mlp.up_proj", "attn_output": "self_attn.o_proj"}.items():
        prefix, W = f"blk.1.{key}.weight", dense[f"model.layers.1.{name}.weight"]
        norm = torch.tensor(tensors[f"{prefix}.in_sum2"] / tensors[f"{prefix}.counts"])[0].sqrt()
        stats, rounded = LayerStats(1, 1, input_norm=norm), QUANTIZERS.get("round")
        made = [rounded(W, stats, grid_of(type), weighted=weighted) for weighted in (False, True)]
        got = found[f"model.layers.1.{name}.weight"]
        assert torch.allclose(got, made[1].decode(torch.float32), rtol=1e-4)
        assert not torch.allclose(got, made[0].decode(torch.float32), rtol=1e-4)
    assert any("gptq with calibration text" in warning for warning in report.warnings)
    assert verify(report.output).ok


def _weights(output: Path) -> dict[str, torch.Tensor]:
    made = output / "out.gguf"
    return load(made if made.exists() else output).state_dict()


def test_a_file_of_another_model_and_another_quantizer_are_refused(place, tmp_path):
    other = tiny.save(tmp_path / "other", tiny.llama(num_hidden_layers=2, intermediate_size=96))
    with pytest.raises(BillhookError, match=r"is of another model: blk\.0\.ffn_down\.weight has 64 columns there"):
        quantize(other, "q4_0", tmp_path / "out", quantizer="round", imatrix=place / "new.gguf")
    with pytest.raises(BillhookError, match="is for quantizer"):
        quantize(place / "model", "q4_0", tmp_path / "out", imatrix=place / "new.gguf")
    assert billhook("eval", place / "new.gguf", "--data", "x").code == 2
    with pytest.raises(BillhookError, match="holds no model: it is an importance matrix"):
        load(place / "new.gguf")


@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7F800001])  # infinity, and NaN that computing may signal
def test_sums_that_are_no_numbers_are_refused_by_the_name_of_the_weight(tmp_path, bits):
    path = tmp_path / "old.dat"
    path.write_bytes(struct.pack("<ii6siiI", 1, 6, b"weight", 3, 1, bits))
    with pytest.raises(BillhookError, match="the squared inputs of weight are not numbers"):
        read_imatrix(path)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_one_error(place, data, tmp_path_factory):
    for name in ("new.gguf", "old.dat"):
        content = bytearray((place / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, min(len(content) - 4, 3000)))
            content[start : start + 4] = data.draw(st.binary(min_size=4, max_size=4))
        path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
        with suppress(BillhookError):
            assert all((values >= 0).all() and np.isfinite(values).all() for values in read_imatrix(path).values())
