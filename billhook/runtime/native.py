"""Pack, expand and multiply weights by the compiled kernels, or without them in plain torch (`fallback.py`)."""

import ctypes

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.runtime import fallback, library
from billhook.runtime.layout import MIN_GROUP, PADDING, mask_bytes
from billhook.runtime.library import TYPES, Matrix

_ALL = slice(None)


class Weight:
    """A weight [out, in] as the kernels read it, with its tensors: packed, or dense bfloat16 without a bitmask."""

    def __init__(self, out_features: int, in_features: int, values: Tensor, *packed: Tensor | None) -> None:
        """`packed` is bitmask, row_starts and scales (or None), contiguous on the CPU; empty for a dense weight."""
        bitmask, starts, scales = packed or (None, None, None)
        self.tensors = (values, bitmask, starts, scales)
        if not all(t is None or (t.is_contiguous() and t.device.type == "cpu") for t in self.tensors):
            raise BillhookError("The kernels read contiguous tensors on the CPU: move layer and inputs to one device.")
        groups = scales.numel() // out_features if scales is not None else 1
        words = mask_bytes(in_features) // 8
        group_words = words if scales is None else -(-group_size(scales, in_features) // 64)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (bitmask, values, starts, scales)]
        self.matrix = Matrix(*pointers, out_features, in_features, words, groups, group_words, TYPES[values.dtype])
        self.address = ctypes.addressof(self.matrix)
        self.shape = (out_features, in_features)
        # The choices of autotune by dtype and token count, and the state in which they were made.
        self.chosen: dict[tuple[torch.dtype, int], str] = {}
        self.chosen_for: tuple[int, int] | None = None

    def __reduce__(self) -> tuple[type["Weight"], tuple[object, ...]]:
        """Copy and pickle the tensors only: addresses are valid for these tensors in this process."""
        return Weight, (*self.shape, *self.tensors)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] Wᵀ + bias -> [..., out] by the fused kernels; bias in the dtype of x."""
        return self._call("billhook_multiply", x, bias)

    def gemm(self, x: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
        """The same by the kernels for many tokens; x and bias both in float32 or both in bfloat16.

        `room` is scratch memory of at least `gemm_bytes` bytes, 1-D uint8.
        """
        return self._call("billhook_gemm", x, bias, room.data_ptr())

    def _call(self, function: str, x: Tensor, bias: Tensor | None, *room: int) -> Tensor:
        kernels, path = library.active() or (None, -1)
        out, columns = self.shape
        if x.shape[-1] != columns or (bias is not None and (bias.shape != (out,) or bias.dtype != x.dtype)):
            given = f"{x.dtype} {list(x.shape)}" + ("" if bias is None else f", bias {bias.dtype} {list(bias.shape)}")
            raise BillhookError(f"A weight of {out} rows and {columns} columns was given inputs {given}.")
        x, stride = _rows(x)
        bias = None if bias is None else bias.contiguous()
        y = x.new_empty((*x.shape[:-1], out))
        added = None if bias is None else bias.data_ptr()
        places = (x.data_ptr(), stride, x.numel() // columns, added, y.data_ptr(), *room)
        if getattr(kernels, function)(self.address, *places, TYPES[x.dtype], path, torch.get_num_threads()):
            raise MemoryError(f"No memory for the activations of a product with {list(x.shape)}.")
        return y

    def gemm_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of scratch memory that `gemm` needs; 0 without a kernel for this instruction set and these dtypes."""
        kernels, path = library.active() or (None, -1)
        if kernels is None or self.tensors[1] is None:
            return 0
        needed: int = kernels.billhook_gemm_bytes(self.address, tokens, TYPES[dtype], path, torch.get_num_threads())
        return needed


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., in] with contiguous rows, and the distance between rows in elements."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.ndim == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


def row_starts(bitmask: Tensor, in_features: int) -> Tensor:
    """The position of each row's first value, int64 [out + 1], from the bitmask, uint8 [out, 8 * ceil(in / 64)].

    The last entry is the number of kept weights. Raises BillhookError for a bitmask of another shape or dtype, or with
    a bit set beyond the last column.
    """
    width = mask_bytes(in_features)
    if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or in_features < 1 or bitmask.shape[1] != width:
        other = f"found {bitmask.dtype} {list(bitmask.shape)}. The packed file is damaged; pack the model again."
        raise BillhookError(f"A bitmask of {in_features} columns must be uint8 [rows, {width}], {other}")
    bitmask = bitmask.contiguous()
    found = library.active()
    if found is None:
        starts = fallback.row_starts(bitmask)
        wrong = bool(fallback.unpack_bits(bitmask[:, -8:], 64)[:, (in_features - 1) % 64 + 1 :].any())
    else:
        starts = torch.empty(bitmask.shape[0] + 1, dtype=torch.int64)
        wrong = found[0].billhook_row_starts(bitmask.data_ptr(), bitmask.shape[0], in_features, starts.data_ptr()) >= 0
    if wrong:
        raise BillhookError(f"A bitmask of {in_features} columns keeps weights beyond the last column: it is damaged.")
    return starts


def check(bitmask: Tensor, values: Tensor, starts: Tensor, shape: tuple[int, int], scales: Tensor | None) -> None:
    """Raise BillhookError unless these have the shapes and dtypes of a packed weight of `shape` as `layout.py`
    describes it, with its padding, outside of which the kernels would read; `starts` are those of `row_starts`."""
    rows, columns = shape
    mask = ("bitmask", bitmask, torch.uint8, (rows, mask_bytes(columns)))
    for name, tensor, dtype, size in (mask, ("positions of rows", starts, torch.int64, (rows + 1,))):
        if tensor.dtype != dtype or tensor.shape != size:
            wrong = f"must be {dtype} {list(size)}, found {tensor.dtype} {list(tensor.shape)}"
            raise BillhookError(f"The {name} of a layer of {rows} rows and {columns} columns {wrong}: it is damaged.")
    nnz = int(starts[-1])
    if int(starts[0]) or bool((starts.diff() < 0).any()):
        raise BillhookError(f"The positions of {rows} rows must begin with 0 and never fall: the layer is damaged.")
    if values.ndim != 1 or values.numel() != nnz + PADDING // values.element_size():
        raise BillhookError(f"The bitmask keeps {nnz} weights, but there are {values.numel()} values with padding.")
    if (values.dtype == torch.int8) != (scales is not None):
        raise BillhookError(f"Values of {values.dtype} {'need' if scales is None else 'have no'} scales.")
    if scales is not None:
        if scales.dtype != torch.float32 or scales.ndim not in (1, 2) or scales.shape[0] != rows:
            wrong = f"found {scales.dtype} {list(scales.shape)}"
            raise BillhookError(f"Scales must be float32 [{rows}] or [{rows}, groups], {wrong}.")
        group_size(scales, columns)


def expand(
    bitmask: Tensor, values: Tensor, starts: Tensor, columns: int, *, rows: slice = _ALL, scales: Tensor | None = None
) -> Tensor:
    """The dense rows [rows, columns] of a packed weight, in the dtype of `values`, or float32 for int8 values.

    `scales`, for int8, is float32 [out] (one per row) or [out, ceil(columns / group)] (one per `group` columns).
    """
    check(bitmask, values, starts, (bitmask.shape[0], columns), scales)
    first, last, _ = rows.indices(bitmask.shape[0])
    packed = (bitmask.contiguous(), starts.contiguous(), None if scales is None else scales.contiguous())
    weight = Weight(bitmask.shape[0], columns, values.contiguous(), *packed)
    return expand_rows(weight, first, max(first, last), values.dtype if scales is None else torch.float32)


def expand_rows(weight: Weight, first: int, last: int, dtype: torch.dtype, room: Tensor | None = None) -> Tensor:
    """Rows [first, last) of a packed weight, dense [rows, in] in `dtype`, scales applied.

    `room` is scratch memory in the dtype of the values, 1-D, for at least that many of them.
    """
    values, bitmask, starts, scales = weight.tensors
    assert bitmask is not None
    assert starts is not None
    found = library.active()
    if found is None:
        dense = fallback.expand(bitmask, values, starts, weight.shape[1], slice(first, last))
    else:
        count = (last - first) * weight.shape[1]
        flat = torch.empty(count, dtype=values.dtype) if room is None else room[:count]
        dense = flat.view(last - first, weight.shape[1])
        width, threads = dense.element_size(), torch.get_num_threads()
        found[0].billhook_expand(weight.address, first, last, dense.data_ptr(), width, found[1], threads)
    if scales is None:
        return dense.to(dtype)
    return (dense.float() * spread_scales(scales[first:last], weight.shape[1])).to(dtype)


def spread_scales(scales: Tensor, in_features: int) -> Tensor:
    """Scales in a shape that multiplies rows [rows, in_features] elementwise."""
    if scales.ndim == 1:
        return scales[:, None]
    return scales.repeat_interleave(group_size(scales, in_features), dim=1)[:, :in_features]


def group_size(scales: Tensor, in_features: int) -> int:
    """Columns that share a scale: a whole row, or the power of two (at least 64) that gives this number of groups.

    Raises BillhookError when there is no such power.
    """
    if scales.ndim == 1:
        return in_features
    groups = scales.shape[1]
    for group in (MIN_GROUP << power for power in range(34)):
        if -(-in_features // group) == groups:
            return group
    raise BillhookError(f"{groups} scales per row do not fit {in_features} columns in groups of 64, 128, 256, ...")


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmask and padded values (`layout.py`) of a dense weight [out, in].

    A weight is removed when all its bytes are zero, so -0.0 is kept and `expand` restores every byte.
    """
    weight = weight.detach().contiguous()
    found = library.active()
    if found is None:
        return fallback.pack(weight)
    (rows, columns), width, threads = weight.shape, weight.element_size(), torch.get_num_threads()
    bitmask = torch.zeros(rows, mask_bytes(columns), dtype=torch.uint8)
    found[0].billhook_bitmask(weight.data_ptr(), width, rows, columns, bitmask.data_ptr(), threads)
    starts = row_starts(bitmask, columns)
    values = torch.zeros(int(starts[-1]) + PADDING // width, dtype=weight.dtype)
    packed = Weight(rows, columns, values, bitmask, starts, None)
    found[0].billhook_gather(weight.data_ptr(), width, packed.address, values.data_ptr(), threads)
    return bitmask, values
