"""GGUF files byte by byte, with metadata and tensors that no writer would write."""

import struct
from collections.abc import Mapping, Sequence

from billhook.store.gguf_file import GgufFile, GgufValue

UINT8, INT32, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, FLOAT64 = 0, 5, 4, 6, 7, 8, 9, 10, 12
_CODES = {UINT8: "B", INT32: "i", UINT32: "I", FLOAT32: "f", BOOL: "?", UINT64: "Q", FLOAT64: "d"}
Tensor = tuple[str, Sequence[int], int, int]  # name, [..., out, in], the type's number, offset


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def stored(value: GgufValue) -> bytes:
    """The type and the value."""
    start = struct.pack("<I", value.type)
    if value.type == STRING:
        return start + text(value.value)
    if value.type != ARRAY:
        return start + struct.pack(f"<{_CODES[value.type]}", value.value)
    one = text if value.element == STRING else lambda x: struct.pack(f"<{_CODES[value.element]}", x)
    return start + struct.pack("<IQ", value.element, len(value.value)) + b"".join(map(one, value.value))


def tensor(name: str | bytes, shape: Sequence[int], type: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", type, offset)


def whole(keys: Sequence[bytes], tensors: Sequence[bytes], data: bytes, alignment: int = 32) -> bytes:
    """A file of finished parts."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join([*keys, *tensors])
    return header + bytes(-len(header) % alignment) + data


def changed(file: GgufFile, metadata: Mapping[str, GgufValue | None]) -> bytes:
    """A file with other values in its metadata; None leaves one out. Without the lists of the tokenizer."""
    from gguf import GGMLQuantizationType

    start = min(entry.start for entry in file.tensors.values())
    own = {key: value for key, value in file.metadata.items() if value.element is None}
    keys = [text(key) + stored(value) for key, value in (own | dict(metadata)).items() if value is not None]
    entries = file.tensors.values()
    tensors = [tensor(e.name, e.shape, GGMLQuantizationType[e.type.upper()], e.start - start) for e in entries]
    return whole(keys, tensors, file.path.read_bytes()[start:])
