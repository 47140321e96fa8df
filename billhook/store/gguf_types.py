"""The tensor types of GGUF files, by their lower-case names: numbers, sizes and decoding.

They are those of the package `gguf`, and those of llama.cpp that are younger than its latest release: q2_0, blocks of
64 columns with a float16 scale and codes −1, 0, 1, 2 of two bits, in order, from the lowest bits on.
"""

import numpy as np

_NEWER = {"q2_0": (42, 64, 18)}  # number, columns of a block, bytes


def type_size(name: str) -> tuple[int, int, int]:
    """The number of a type, the columns of a block and its bytes; raises KeyError for an unknown one."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if name in _NEWER:
        return _NEWER[name]
    kind = GGMLQuantizationType[name.upper()]
    return (int(kind), *GGML_QUANT_SIZES[kind])


def type_name(number: int) -> str:
    """The name of a type by its number; raises ValueError for an unknown one."""
    from gguf import GGMLQuantizationType

    newer = {size[0]: name for name, size in _NEWER.items()}
    return newer.get(number) or GGMLQuantizationType(number).name.lower()


def decoded(data: np.ndarray, name: str) -> np.ndarray:
    """The values float32 [..., columns] of bytes uint8 [..., bytes]; raises NotImplementedError for some types."""
    from gguf import GGMLQuantizationType, quants

    if name not in _NEWER:
        return quants.dequantize(data, GGMLQuantizationType[name.upper()])
    blocks = data.reshape(*data.shape[:-1], -1, _NEWER[name][2])
    scales, codes = blocks[..., :2].copy().view(np.float16), blocks[..., 2:, None] >> np.arange(0, 8, 2) & 3
    values = (codes.reshape(*codes.shape[:-2], -1) - np.float32(1)) * scales.astype(np.float32)
    return values.reshape(*data.shape[:-1], -1)
