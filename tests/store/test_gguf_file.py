"""GGUF files from strangers: whatever is wrong with one is one error, without a large allocation."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from billhook.errors import BillhookError
from billhook.store.gguf_file import read_gguf


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", b"\xff", "ü"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_add_bos_token(True)
    writer.add_tensor("plain", np.arange(12, dtype=np.float32).reshape(3, 4))
    packed = gguf.quantize(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_read_as_the_gguf_package_wrote_it(good):
    file = read_gguf(good)
    assert file.arch == "llama"
    assert file.metadata["llama.block_count"].value == 2
    assert file.metadata["tokenizer.ggml.tokens"].value == [b"a", b"\xff", "ü".encode()]
    assert file.metadata["tokenizer.ggml.add_bos_token"].value is True
    assert {name: (entry.type, entry.shape) for name, entry in file.tensors.items()} == {
        "plain": ("f32", (3, 4)),
        "packed": ("q8_0", (2, 32)),
    }
    np.testing.assert_array_equal(file.values(file.tensors["plain"]), np.arange(12).reshape(3, 4))
    error = file.values(file.tensors["packed"]) - np.linspace(-1, 1, 64).reshape(2, 32)
    assert np.abs(error).max() < 0.005


def test_a_file_that_ends_anywhere_is_one_error(good, tmp_path):
    whole, path = good.read_bytes(), tmp_path / "cut.gguf"
    for length in range(0, len(whole) - 32, 3):  # the last bytes only fill up to a multiple of 32
        path.write_bytes(whole[:length])
        with pytest.raises(BillhookError, match=r"cut\.gguf is not a GGUF file, or it is damaged"):
            read_gguf(path)


def test_any_bytes_in_the_header_are_read_or_one_error_without_a_large_allocation(good, tmp_path):
    whole, path, random = good.read_bytes(), tmp_path / "bad.gguf", np.random.default_rng(0)
    header = whole.index(b"packed") + 60
    messages, lengths = [], [0, 1, 7, 1 << 16, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1]
    tracemalloc.start()
    for _ in range(1500):
        data = bytearray(whole)
        place = int(random.integers(8, header))
        number = struct.pack("<Q", lengths[random.integers(len(lengths))])
        new = number if random.random() < 0.5 else random.bytes(int(random.integers(1, 4)))
        data[place : place + len(new)] = new
        path.write_bytes(data)
        try:
            file = read_gguf(path)
        except BillhookError as error:
            messages.append(str(error))
        else:
            for entry in file.tensors.values():
                file.values(entry)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
    assert not any("\n" in message or len(message) > 400 + len(str(path)) for message in messages)


def test_one_of_several_parts_is_refused(good, tmp_path):
    path = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BillhookError, match="is one of 3 parts: join them with llama-gguf-split --merge"):
        read_gguf(path)
