"""Where a model is computed, and in which dtype: what `auto` means, decided in one place."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from billhook.errors import BillhookError
from billhook.store.files import in_one_line
from billhook.store.layout import is_packed
from billhook.store.shards import Shard, read_shard, weight_files
from billhook.store.tensor_bytes import DTYPES as STORED
from billhook.store.tensor_bytes import read_tensor

AUTO = "auto"
_DEVICES = "Use auto, cpu, cuda or cuda:1."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def chosen_device(device: str) -> str:
    """`device`; for "auto" the GPU that torch can use, or else the processor.

    Raises BillhookError for a device on which torch cannot compute here.
    """
    if device == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        value = torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BillhookError(f"Cannot compute on device {device!r}: {in_one_line(error)}. {_DEVICES}") from None
    if value.is_meta:
        raise BillhookError(f"Cannot compute on device {device!r}: its tensors have no values. {_DEVICES}")
    return device


def chosen_dtype(dtype: str | torch.dtype, device: str, path: Path) -> torch.dtype:
    """`dtype`; for "auto" float32 on a processor, and on a GPU that of the weights of the model directory `path`.

    `device` is one that `chosen_device` returned. Float64 weights are computed in float32. Raises BillhookError for an
    unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != AUTO and dtype not in DTYPES:
        raise BillhookError(f"Unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}.")
    if dtype != AUTO:
        return DTYPES[dtype]
    found = None if torch.device(device).type == "cpu" else stored_dtype(path)
    return torch.float32 if found is None or found == torch.float64 else found


def stored_dtype(path: Path) -> torch.dtype | None:
    """The floating-point dtype of most weights of a model directory, dense or packed; None without weights."""
    files = sorted(path.glob("*.safetensors")) if is_packed(path) else weight_files(path)
    return most_frequent(read_shard(file) for file in files)


def stored_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The dtypes of the tensors of a dense model directory by their names in its files."""
    entries = {name: entry for file in weight_files(path) for name, entry in read_shard(file).entries.items()}
    return {name: STORED[entry.dtype] for name, entry in entries.items() if entry.dtype in STORED}


def most_frequent(shards: Iterable[Shard]) -> torch.dtype | None:
    """The floating-point dtype with the most bytes in files; None where there is none."""
    sizes: Counter[torch.dtype] = Counter()
    for shard in shards:
        for entry in shard.entries.values():
            if (dtype := STORED.get(entry.dtype)) is not None and dtype.is_floating_point:
                sizes[dtype] += entry.stop - entry.start
    return sizes.most_common(1)[0][0] if sizes else None


def free_gib(device: str) -> float | None:
    """Free memory of the device, or of the system for a CPU, in GiB; None where that is unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] / 2**30
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), None)


def lacking_gib(path: Path, dtype: torch.dtype, device: str) -> tuple[float, float] | None:
    """The GiB that the weights of a dense directory need in `dtype`, and those that are free if these are fewer."""
    stored, free = (None if is_packed(path) else stored_dtype(path)), free_gib(device)
    if stored is None or free is None:
        return None
    needed = sum(map(_numbers, map(read_shard, weight_files(path)))) * dtype.itemsize / 2**30
    return (needed, free) if needed > free else None


def _numbers(shard: Shard) -> int:
    """The numbers in a file; of weights that are packed for compressed-tensors those that they are decoded to."""
    shapes = []
    for entry in shard.entries.values():
        decoded = entry.name.endswith(".weight_shape") and (entry.dtype, entry.shape) == ("I64", (2,))
        shapes.append(tuple(read_tensor(shard.path, entry).tolist()) if decoded else entry.shape)
    return sum(map(math.prod, shapes))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")
