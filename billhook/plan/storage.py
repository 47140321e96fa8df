"""Storage types: what one weight can be stored as, and how many bits that takes. No torch.

A type stores runs of consecutive columns of a row as blocks of a fixed size, scales and minima included, so that its
bits per weight follow from its name. Sizes of GGUF types: `GGML_QUANT_SIZES` of the `gguf` package. `intB/GROUP` is
scalar quantization with B-bit codes, and a 16-bit scale and a B-bit zero point for every GROUP columns.
"""

import re

from billhook.errors import BillhookError
from billhook.registry import hint

BLOCKS: dict[str, tuple[int, int]] = {  # name -> (columns, bytes) of a block
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q6_k": (256, 210),
    "q5_k": (256, 176),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_k": (256, 144),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "q3_k": (256, 110),
    "q2_k": (256, 84),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
    "iq3_s": (256, 110),
    "iq3_xxs": (256, 98),
    "iq2_s": (256, 82),
    "iq2_xs": (256, 74),
    "iq2_xxs": (256, 66),
    "iq1_m": (256, 56),
    "iq1_s": (256, 50),
}
_SCALAR = re.compile(r"int([2-8])/([1-9][0-9]{0,4})", re.ASCII)


def bits(name: str) -> float:
    """Average stored bits per weight of a type, scales and minima included; raises BillhookError for an unknown one."""
    columns, size = _block(name)
    return size / columns


def block(name: str) -> int:
    """The number of columns in a block of a type, by which a layer's columns must divide; errors as in `bits`."""
    return _block(name)[0]


def stored_bytes(name: str, shape: tuple[int, int]) -> int:
    """Bytes of a weight [out, in] stored as a type whose block divides its columns; errors as in `bits`."""
    columns, size = _block(name)
    return -(-shape[0] * shape[1] // columns * size // 8)


def _block(name: str) -> tuple[int, int]:
    """Columns and bits of a block."""
    if name in BLOCKS:
        columns, size = BLOCKS[name]
        return columns, 8 * size
    if scalar := _SCALAR.fullmatch(name):
        code, columns = int(scalar[1]), int(scalar[2])
        return columns, columns * code + 16 + code
    candidates = [f"{name[:4]}/64"] if re.match("int[2-8]", name) else BLOCKS
    near = hint(name.lower()[:40], candidates)
    raise BillhookError(
        f"Unknown storage type {name!r:.40}.{near} There are: {', '.join(BLOCKS)}, and intB/GROUP with B from 2 to 8, "
        "such as int4/64."
    )
