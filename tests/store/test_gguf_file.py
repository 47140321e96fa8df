"""GGUF files from strangers: whatever is wrong with one is one error, without a large allocation."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, INT32, STRING, UINT8, UINT32, UINT64, stored, tensor, text, whole

from billhook.errors import BillhookError
from billhook.store.gguf_file import GgufValue, read_gguf


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


F32, Q8_0 = 0, 8
ARCH = text("general.architecture") + stored(GgufValue("llama", STRING))
TENSORS = [tensor("a", [2, 4], F32, 0), tensor("b", [1, 32], Q8_0, 32)]
DATA = bytes(96)
ALIGNMENT = text("general.alignment")
HUGE = struct.pack("<Q", 1 << 63)
MOST = (1 << 64) - 1


def key(name: str, kind: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def begun(tensors: int, keys: int, version: bytes = b"\x03\0\0\0") -> bytes:
    return b"GGUF" + version + struct.pack("<QQ", tensors, keys) + ARCH + bytes(64)


DAMAGED = {
    "more tensors than bytes": begun(1 << 63, 1),
    "more keys than bytes": begun(0, MOST),
    "version 1": begun(0, 1, b"\x01\0\0\0"),
    "big-endian": begun(0, 1, b"\0\0\0\x03"),
    "no architecture": whole([key("general.name", STRING, text("x"))], TENSORS, DATA),
    "architecture is a number": whole([key("general.architecture", UINT32, bytes(4))], TENSORS, DATA),
    "a key twice": whole([ARCH, ARCH], TENSORS, DATA),
    "a key that is no text": whole([ARCH, text(b"\xff") + stored(GgufValue(1, UINT32))], TENSORS, DATA),
    "a text longer than the file": whole([ARCH, key("x", STRING, HUGE)], TENSORS, DATA),
    "a key longer than the file": whole([ARCH, HUGE], TENSORS, DATA),
    "an array longer than the file": whole([ARCH, key("x", ARRAY, struct.pack("<I", UINT8) + HUGE)], TENSORS, DATA),
    "an array of texts": whole([ARCH, key("x", ARRAY, struct.pack("<I", STRING) + HUGE)], TENSORS, DATA),
    "an array of arrays": whole([ARCH, key("x", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12))], TENSORS, DATA),
    "an unknown type": whole([ARCH, key("x", 13, bytes(8))], TENSORS, DATA),
    "alignment 0": whole([ARCH, ALIGNMENT + stored(GgufValue(0, UINT32))], TENSORS, DATA),
    "alignment 24": whole([ARCH, ALIGNMENT + stored(GgufValue(24, UINT32))], TENSORS, DATA + bytes(32), 24),
    "alignment below 0": whole([ARCH, ALIGNMENT + stored(GgufValue(-32, INT32))], TENSORS, DATA),
    "alignment is a text": whole([ARCH, ALIGNMENT + stored(GgufValue("32", STRING))], TENSORS, DATA),
    "alignment beyond the file": whole([ARCH, ALIGNMENT + stored(GgufValue(1 << 31, UINT32))], TENSORS, DATA),
    "no dimensions": whole([ARCH], [tensor("a", [], F32, 0)], DATA),
    "five dimensions": whole([ARCH], [tensor("a", [1] * 5, F32, 0)], DATA),
    "a dimension of 0": whole([ARCH], [tensor("a", [0, 4], F32, 0)], DATA),
    "a dimension below 0": whole([ARCH], [tensor("a", [MOST, 4], F32, 0)], DATA),
    "sizes whose product overflows": whole([ARCH], [tensor("a", [1 << 32, 1 << 32], F32, 0)], DATA),
    "a part of a block": whole([ARCH], [tensor("a", [1, 33], Q8_0, 0)], DATA),
    "an unknown type of tensor": whole([ARCH], [tensor("a", [4], 999, 0)], DATA),
    "a name that is no text": whole([ARCH], [tensor(b"\xff", [4], F32, 0)], DATA),
    "a name twice": whole([ARCH], [tensor("a", [4], F32, 0), tensor("a", [4], F32, 32)], DATA),
    "values beyond the file": whole([ARCH], [tensor("a", [8], F32, 96)], DATA),
    "values that end beyond the file": whole([ARCH], [tensor("a", [9], F32, 64)], DATA),
    "an offset of 2^63": whole([ARCH], [tensor("a", [4], F32, 1 << 63)], DATA),
    "the same values twice": whole([ARCH], [tensor("a", [4], F32, 0), tensor("b", [4], F32, 0)], DATA),
    "values that overlap": whole([ARCH], [tensor("a", [16], F32, 0), tensor("b", [8], F32, 32)], DATA),
    "values off the alignment": whole([ARCH], [tensor("a", [4], F32, 4)], DATA),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_header_with_one_impossible_number_is_one_error_without_a_large_allocation(name, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(DAMAGED[name])
    tracemalloc.start()
    with pytest.raises(BillhookError, match=r"bad\.gguf is not a GGUF file, or it is damaged \(.{3,200}\)"):
        read_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_the_values_begin_at_the_alignment(alignment, tmp_path):
    """The same parts as in the damaged files, in order."""
    path = tmp_path / "good.gguf"
    keys = [ARCH, key("flag", BOOL, b"\1"), key("big", UINT64, HUGE), ALIGNMENT + stored(GgufValue(alignment, UINT32))]
    values = np.arange(16, dtype=np.float32)
    path.write_bytes(whole(keys, [tensor("a", [2, 8], F32, 0)], values.tobytes(), alignment))
    file = read_gguf(path)
    assert (file.metadata["flag"].value, file.metadata["big"].value) == (True, 1 << 63)
    np.testing.assert_array_equal(file.values(file.tensors["a"]), values.reshape(2, 8))


@pytest.mark.parametrize(
    "value", [GgufValue(0, UINT32), GgufValue("x" * 10_000, STRING), GgufValue([1, 2], ARRAY, UINT8)]
)
@pytest.mark.parametrize("name", ["part.gguf", "part-00001-of-00000.gguf"])
def test_any_number_of_parts_but_one_is_refused_in_a_few_words(value, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(whole([ARCH, text("split.count") + stored(value)], TENSORS, DATA))
    with pytest.raises(BillhookError, match=r"is one of .{1,20} parts: put all of them into one folder"):
        read_gguf(path)


def test_one_of_several_parts_is_refused(good, tmp_path):
    path = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BillhookError, match="is one of 3 parts: put all of them into one folder"):
        read_gguf(path)
