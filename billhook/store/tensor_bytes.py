"""The dtypes of safetensors files by name, and the bytes of a tensor."""

import numpy as np
import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, byte by byte; writing to it changes the tensor."""
    raw: np.ndarray = tensor.detach().view(-1).view(torch.uint8).numpy()
    return raw.data
