"""Storage types of a weight, and their bits. No torch.

A type stores runs of consecutive columns of a row as blocks of a fixed size, scales and minima included, so that its
bits per weight follow from its name. Sizes of GGUF types are those of llama.cpp. `intB/GROUP` is
symmetric scalar quantization with B-bit codes, and a 16-bit scale for every GROUP columns.
"""

import re

from billhook.errors import BillhookError
from billhook.registry import hint

_SIZES = {  # columns of a block -> its bytes, by type
    1: {"f32": 4, "f16": 2, "bf16": 2},
    32: {"q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18, "mxfp4": 17},
    64: {"q2_0": 18},
    256: {"q6_k": 210, "q5_k": 176, "q4_k": 144, "q3_k": 110, "q2_k": 84, "iq4_xs": 136, "iq3_s": 110}
    | {"iq3_xxs": 98, "iq2_s": 82, "iq2_xs": 74, "iq2_xxs": 66, "iq1_m": 56, "iq1_s": 50},
}
BLOCKS = {name: (columns, size) for columns, sizes in _SIZES.items() for name, size in sizes.items()}
_MIX = re.compile(r"(q[2-6]_k|iq[23])_(?:[sml]|x[sl])", re.ASCII)  # files of llama.cpp that hold several types
_SCALAR = re.compile(r"int([2-8])/([1-9][0-9]{0,4})", re.ASCII)


def bits(name: str) -> float:
    """Average stored bits per weight of a type, scales and minima included; raises BillhookError for an unknown one."""
    columns, size = _block(name)
    return size / columns


def block(name: str) -> int:
    """Columns in a block of a type, of which a layer's columns must be a multiple; errors as in `bits`."""
    return _block(name)[0]


def stored_bytes(name: str, shape: tuple[int, int]) -> int:
    """Bytes of a weight [out, in] stored as a type whose block divides its columns; errors as in `bits`.

    The codes of a row of a scalar type fill whole words of 32 bits.
    """
    columns, size = _block(name)
    blocks = shape[1] // columns
    codes = -(-blocks * (size - 16) // 32) * 4 + 2 * blocks
    return shape[0] * (blocks * size // 8 if name in BLOCKS else codes)


def _block(name: str) -> tuple[int, int]:
    """Columns and bits of a block."""
    if name in BLOCKS:
        columns, size = BLOCKS[name]
        return columns, 8 * size
    if scalar := _SCALAR.fullmatch(name):
        code, columns = int(scalar[1]), int(scalar[2])
        return columns, columns * code + 16
    if mix := _MIX.fullmatch(name):
        one = mix[1] if mix[1] in BLOCKS else f"{mix[1]}_s"
        raise BillhookError(
            f"{name} is no type but a mix of several: use {one} for all layers, or billhook compress with a size."
        )
    near = hint(name[:40], [f"{name[:4]}/64"] if re.match("int[2-8]", name) else BLOCKS)
    known = f"{', '.join(BLOCKS)}, and intB/GROUP with B from 2 to 8, such as int4/64"
    raise BillhookError(f"Unknown storage type {name!r:.40}.{near} There are: {known}.")
