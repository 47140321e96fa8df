"""Products with a packed weight on a CUDA device, in a named way.

`matvec-4x4` multiplies one token directly from the packed form, `matmat-64x8` up to 16 (the numbers are rows and warps
of a program), by the kernels of `triton_kernels.py`; `expand` writes a temporary dense weight for cuBLAS. Where the
kernels cannot run, every way expands in plain torch, no faster than dense. Needs neither Triton nor a GPU to import.
"""

import importlib
import importlib.util
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from billhook.errors import BillhookError
from billhook.runtime import native
from billhook.runtime.fallback import count_bits, unpack_bits

BUCKETS = (1, 4, 16)  # each word of `ways` is for up to this many tokens; for more, a weight is expanded
EXPAND = "expand"
_CHUNK_BYTES = 32  # bytes of bitmask that a warp reads at once


def missing(device: torch.device | str = "cuda") -> str | None:
    """Why the kernels cannot run on `device`, in one line, or None where they can."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device: packed layers run on the CPU."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: packed layers are no faster than dense ones. Run: pip install triton."
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return "The GPU has no CUDA compute capability 8.0: packed layers are no faster than dense ones."
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU (or TRITON_INTERPRET=1, to test)."
    return None


@cache
def kernels(device: torch.device) -> ModuleType | None:
    """The module of Triton kernels where they run on `device`, else None."""
    return None if missing(device) else importlib.import_module("billhook.runtime.triton_kernels")


def chunk_table(bitmask: Tensor, row_starts: Tensor) -> Tensor:
    """The position of the first value of each 256 columns of each row, int32 [rows, ceil(bytes per row / 32)].

    Raises BillhookError for a weight with more values than int32 can count.
    """
    if int(row_starts[-1]) >= 2**31:
        raise BillhookError(f"A layer with {int(row_starts[-1])} kept weights is too large for the GPU kernels.")
    rows, width = bitmask.shape
    padded = F.pad(count_bits(bitmask), (0, -width % _CHUNK_BYTES))
    counts = padded.view(rows, -1, _CHUNK_BYTES).sum(-1, dtype=torch.int64)
    return (row_starts[:-1, None] + counts.cumsum(1) - counts).int()


@dataclass(frozen=True)
class Weight:
    """A packed weight as the kernels read it; `group` columns share a scale (0: no scales)."""

    bitmask: Tensor
    values: Tensor
    table: Tensor
    scales: Tensor | None
    group: int

    def arguments(self, columns: int) -> tuple[int, ...]:
        """rows, columns, bytes per row, chunks per row, scales per row."""
        groups = -(-columns // self.group) if self.group else 0
        return self.bitmask.shape[0], columns, self.bitmask.shape[1], self.table.shape[1], groups

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which this weight and `x` are multiplied."""
        return x.dtype if self.values.dtype == torch.int8 else torch.promote_types(x.dtype, self.values.dtype)


def expand(weight: Weight, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [rows, columns]."""
    module = kernels(weight.bitmask.device)
    if module is None:
        keep = unpack_bits(weight.bitmask, columns)
        dense = weight.values.new_zeros(keep.shape).masked_scatter_(keep, weight.values)
        if weight.scales is not None:
            dense = dense.float() * native.spread_scales(weight.scales, columns)
        return dense.to(dtype)
    dense = torch.empty(weight.bitmask.shape[0], columns, dtype=dtype, device=weight.bitmask.device)
    rows, span = 4, 4
    sizes = weight.arguments(columns)
    tensors = weight.bitmask, weight.values, weight.table, weight.scales, dense
    options = {"ROWS": rows, "SPAN": span, "GROUP": weight.group, "num_warps": span}
    module.expand[(-(-sizes[0] // rows), -(-sizes[3] // span))](*tensors, *sizes, **options)
    return dense


def _matvec(weight: Weight, x: Tensor, bias: Tensor | None, rows: int, span: int) -> Tensor:
    """x [1, columns] times the weight, by programs of `rows` rows and `span` warps."""
    sizes = weight.arguments(x.shape[1])
    y = x.new_empty(1, sizes[0])
    tensors = weight.bitmask, weight.values, weight.table, weight.scales, bias, x, y
    options = {"ROWS": rows, "SPAN": span, "GROUP": weight.group, "BIAS": bias is not None, "num_warps": span}
    _module(x).matvec[(-(-sizes[0] // rows),)](*tensors, *sizes, **options)
    return y


def _matmat(weight: Weight, x: Tensor, bias: Tensor | None, rows: int, warps: int) -> Tensor:
    """x [tokens, columns] times the weight for up to 16 tokens, with columns split over the multiprocessors."""
    sizes = weight.arguments(x.shape[1])
    tokens, programs = x.shape[0], -(-sizes[0] // rows)
    share = max(1, sizes[3] * programs // (4 * _multiprocessors(x.device)))
    splits = -(-sizes[3] // share)
    x = x.to(weight.dtype(x))
    parts = torch.empty(splits, tokens, sizes[0], dtype=torch.float32, device=x.device)
    options = {"ROWS": rows, "TOKENS": BUCKETS[-1], "GROUP": weight.group, "num_warps": warps, "num_stages": 1}
    tensors = weight.bitmask, weight.values, weight.table, weight.scales, x, parts
    _module(x).matmat[(programs, splits)](*tensors, *sizes, tokens, share, **options)
    total = parts.sum(0)
    return total if bias is None else total + bias


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _module(x: Tensor) -> Any:
    module = kernels(x.device)
    assert module is not None
    return module


def way_for(ways: str, tokens: int) -> str:
    """The word of `ways` (one for each of BUCKETS) for this number of tokens."""
    return next((way for way, most in zip(ways.split(), BUCKETS, strict=True) if 0 < tokens <= most), EXPAND)


@torch.library.custom_op("billhook::gpu_linear", mutates_args=())
def gpu_linear(
    x: Tensor,
    bitmask: Tensor,
    values: Tensor,
    table: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    *,
    group: int,
    ways: str,
) -> Tensor:
    """x [tokens, columns] -> [tokens, rows] in the dtype of x, by the way in `ways` for this number of tokens."""
    weight, x = Weight(bitmask, values, table, scales, group), x.contiguous()
    name, _, shape = way_for(ways, x.shape[0]).partition("-")
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if name == EXPAND or kernels(x.device) is None:
            dtype = weight.dtype(x)
            y = F.linear(x.to(dtype), expand(weight, x.shape[1], dtype), None if bias is None else bias.to(dtype))
        else:
            rows, span = (int(number) for number in shape.split("x"))
            y = {"matvec": _matvec, "matmat": _matmat}[name](weight, x, bias, rows, span)
    return y.to(x.dtype)


@gpu_linear.register_fake
def _(x: Tensor, bitmask: Tensor, *packed: Tensor | None, group: int, ways: str) -> Tensor:
    return x.new_empty(x.shape[0], bitmask.shape[0])
