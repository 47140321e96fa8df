"""Bytes of GGUF types: the package `gguf` reads what we write, and we read what anyone wrote."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.errors import JobError
from billhook.methods.quantize import QUANTIZERS, ggml_bytes
from billhook.methods.quantize.ggml import GGML
from billhook.methods.quantize.ggml_bytes import pack, unpack
from billhook.methods.statistics import LayerStats
from billhook.plan import storage

QUICK = ("q8_0", "q4_k", "iq3_xxs")  # one of each kind
HALVES = {  # where blocks hold float16 numbers, in bytes
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "mxfp4": (),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
}


def dequantized(data, name):
    if name == "q2_0":  # younger than the package
        values = [decode_q2_0(block) for row in data.numpy() for block in row.reshape(-1, 18)]
        return np.array(values, np.float32).reshape(len(data), -1)
    return quants.dequantize(data.numpy(), GGMLQuantizationType[name.upper()])


def decode_q2_0(block):
    d = block[:2].copy().view(np.float16)[0].astype(np.float32)
    return [np.float32((int(block[2 + j // 4]) >> 2 * (j % 4) & 3) - 1) * d for j in range(64)]


def same_bits(a, b):
    return np.array_equal(a.view(np.int32), b.view(np.int32))


@st.composite
def weights(draw):
    """Rows of ordinary, heavy-tailed, huge, tiny, constant and zero weights, in which some groups are zero."""
    out, columns = draw(st.integers(1, 7)), 256 * draw(st.integers(1, 2))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    W = torch.randn(out, columns, generator=g)
    for row in range(out):
        kind = draw(st.sampled_from(["plain", "heavy", "constant", "zero", "holes", "outlier"]))
        if kind == "heavy":
            W[row] = W[row] ** 3
        if kind == "constant":
            W[row] = W[row, 0]
        if kind == "zero":
            W[row] = 0
        if kind == "holes":
            W[row] *= (torch.rand(columns // 16, generator=g) < 0.5).repeat_interleave(16)
        if kind == "outlier":
            W[row, 5] = 1e4
        W[row] *= draw(st.sampled_from([1, 0.02, -1, 1e-4, 1e-8, 1e-30, 1e-42, 1e4, 1e20, 1e30]))
    return W, torch.rand(columns, generator=g) * draw(st.sampled_from([0, 1, 1e-30, 1e30]))


@pytest.mark.gate
@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.nightly) for x in GGML])
@settings(max_examples=10, deadline=None)
@given(case=weights())
def test_gguf_decodes_our_bytes_to_our_values_bit_for_bit_and_we_read_them_back(name, case):
    W, weight = case
    made = QUANTIZERS.get("round")(W, LayerStats(1, 1, input_norm=weight.sqrt()), GGML[name], weighted=True)
    data = pack(made)
    assert data.dtype == torch.uint8
    assert data.numel() == storage.stored_bytes(name, W.shape)
    assert same_bits(dequantized(data, name), made.decode(torch.float32).numpy())
    read = unpack(data, name)
    assert torch.equal(read.codes, made.codes)
    assert torch.equal(read.scales.scale, made.scales.scale)
    assert read.scales.parts.keys() == made.scales.parts.keys()
    assert all(torch.equal(part, made.scales.parts[key]) for key, part in read.scales.parts.items())


@pytest.mark.nightly
@pytest.mark.parametrize("name", GGML)
def test_llama_cpp_decodes_our_bytes_to_our_values(name):
    libgguf = pytest.importorskip("libgguf", reason="needs the extra dev-slow")
    if name == "q2_0":
        pytest.skip("libgguf does not know it")
    W = torch.randn(5, 512, generator=torch.Generator().manual_seed(4)) * 0.02
    made = QUANTIZERS.get("round")(W, LayerStats(1, 1), GGML[name])
    theirs = libgguf.dequantize_rows(pack(made).numpy(), GGMLQuantizationType[name.upper()], n_per_row=512)
    assert same_bits(theirs, made.decode(torch.float32).numpy())


@pytest.mark.parametrize("name", GGML)
def test_any_bytes_with_finite_scales_decode_as_gguf_decodes_them_and_are_written_as_they_were(name):
    size = storage.BLOCKS[name][1]
    data = torch.randint(0, 256, (9, 3, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    for at in HALVES.get(name, (0,)):
        high = data[:, :, at + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40  # no infinity and no NaN
    if name == "mxfp4":
        numbers = torch.randint(0, 15, (9, 3, 16, 2), generator=torch.Generator().manual_seed(2))
        numbers += numbers > 7  # 8 is a second zero, which is written as the first
        data[:, :, 1:] = (numbers[..., 0] | numbers[..., 1] << 4).to(torch.uint8)
    data = data.flatten(1)
    read = unpack(data, name)
    assert np.array_equal(read.decode(torch.float32).numpy(), dequantized(data, name))
    written = pack(read)
    used = (read.scales.scale != 0).view(9, 3, -1).all(2)  # codes are not kept where a scale is 0
    assert used.any()
    assert torch.equal(written.view(9, 3, size)[used], data.view(9, 3, size)[used])
    assert np.array_equal(dequantized(written, name), dequantized(data, name))


def test_many_rows_are_packed_and_read_as_each_alone(monkeypatch):
    monkeypatch.setattr(ggml_bytes, "_WEIGHTS_AT_ONCE", 1024)
    W = torch.randn(7, 512, generator=torch.Generator().manual_seed(2))
    made = QUANTIZERS.get("round")(W, LayerStats(1, 1), GGML["q3_k"])
    data = pack(made)
    assert same_bits(dequantized(data, "q3_k"), made.decode(torch.float32).numpy())
    assert torch.equal(unpack(data, "q3_k").codes, made.codes)


def test_bytes_that_are_not_whole_blocks_and_scales_that_are_not_finite_are_refused():
    with pytest.raises(JobError, match="35 bytes a row are not whole blocks of q8_0"):
        unpack(torch.zeros(2, 35, dtype=torch.uint8), "q8_0")
    with pytest.raises(JobError, match="not finite"):
        unpack(torch.full((2, 34), 0xFF, dtype=torch.uint8), "q8_0")
