"""The dtypes of safetensors files by name, the bytes of a tensor, and tensors that were computed in another dtype."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from billhook.errors import Interrupted, JobError
from billhook.store.shards import Entry

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """A tensor of a safetensors file, in its dtype on disk; raises Interrupted when it cannot be read."""
    value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    data = tensor_bytes(value)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(entry.start)
            while data and (count := file.readinto(data)):
                data = data[count:]
    except OSError as error:
        raise Interrupted(f"Cannot read the weights {path}: {error.strerror or error}.") from None
    if data:
        raise Interrupted(f"{path} was cut off while it was being read: {entry.name} is incomplete.")
    return value


def same_where_kept(new: Tensor, old: Tensor) -> Tensor:
    """`new`, which was computed from `old` in another dtype, in the dtype of `old`: exactly `old` where it was kept.

    A tensor that did not change at all is `old`. Elsewhere zeros are zeros, also of values of `old` that are zero in
    the dtype of `new`.
    """
    kept = new == old.to(new.dtype)
    if bool(kept.all()):
        return old
    return torch.where(kept & (new != 0), old, new.to(old.dtype))


def as_stored(name: str, new: Tensor, dtype: torch.dtype, source: Callable[[], Tensor]) -> Tensor:
    """A tensor in the dtype of its file, contiguous on the CPU, with the values of the source where it was kept.

    `source` returns these values, of the shape of `new`, in a dtype that holds every value of `dtype`; it is called
    where the dtype of `new` does not. Raises JobError for a new value that does not fit `dtype`.
    """
    new = new.detach().to("cpu")
    value = new.to(dtype) if exact(dtype, new.dtype) else same_where_kept(new, source().to(dtype))
    if value.dtype != new.dtype and value.is_floating_point() and not torch.isfinite(value).all():
        stored = next(key for key, known in DTYPES.items() if known == dtype)
        raise JobError(f"{name} holds values that do not fit {stored}, its dtype on disk.")
    return value.contiguous()


def exact(dtype: torch.dtype, wider: torch.dtype) -> bool:
    """Whether `wider` holds every value of `dtype`."""
    return torch.promote_types(dtype, wider) == wider


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, byte by byte; writing to it changes the tensor."""
    raw: np.ndarray = tensor.detach().view(-1).view(torch.uint8).numpy()
    return raw.data
