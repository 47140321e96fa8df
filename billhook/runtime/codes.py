"""The loops that choose codes of weights, by the compiled kernels (csrc/codes.h), or without them in plain torch.

Weights are transposed, [columns, out], so that a column is a row of memory. `points` are the codes that a weight can
have, ascending: a range, or a tuple of integers between -128 and 127; a code is the nearest of them. All instruction
sets give the same codes; plain torch may differ where two codes are equally near to 1e-5.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from billhook.runtime import library, plain_codes
from billhook.runtime.plain_codes import Values, inverse

Sums = tuple[Tensor, Tensor, Tensor]  # three tensors [groups, out]
_MOST_COLUMNS = 256  # as in csrc/billhook.h
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class _Codes(ctypes.Structure):
    _fields_ = (
        ("points", _POINTER),
        ("count", _LONG),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("mirrored", ctypes.c_int32),
    )


def _job(pointers: str, sizes: str) -> type[ctypes.Structure]:
    """The structure that a kernel takes, by the names of its pointers and sizes."""
    fields = [("codes", _Codes), *((x, _POINTER) for x in pointers.split()), *((x, _LONG) for x in sizes.split())]
    return type("_Job", (ctypes.Structure,), {"_fields_": fields})


class _SumsJob(_job("x weight scale offset tried found", "groups group rows tries")):  # type: ignore[misc]
    _fields_ = (("most", ctypes.c_float),)


_RoundJob = _job("x factor scale inverse offset zero found errors", "columns group rows")
_MoveJob = _job("gram step scale inverse free slope found change", "columns rows")


def code_sums(x: Tensor, weight: Tensor, values: Values) -> Sums:
    """Sums over each group of weight times code, code² and code · x for the codes nearest to (x - offset) / scale.

    x is [groups, group, out], `weight` [groups, group].
    """
    scale, offset, points = values
    if not _compiled(x.shape[1], x, weight, scale, offset):
        return plain_codes.code_sums(x, weight, values)
    a, b, c = _found("billhook_code_sums", 3, x, weight, points, scale=scale, offset=offset)
    return a, b, c


def search_scale(
    x: Tensor, weight: Tensor, unit: Tensor, tried: Sequence[float], points: Sequence[int], *, mirrored: bool = False
) -> tuple[Tensor, Tensor]:
    """The best of the scales `tried` · unit, each improved twice by least squares, and sum(weight · code²).

    x is [groups, group, out], `weight` [groups, group], `unit` and both results [groups, out]. Where `mirrored`, the
    points are positive and stand for both signs.
    """
    if not _compiled(x.shape[1], x, weight, unit):
        return plain_codes.search_scale(x, weight, unit, tried, points, mirrored)
    numbers = torch.tensor(tried, dtype=torch.float32, device="cpu")
    name = "billhook_search_scale"
    scale, power = _found(name, 2, x, weight, points, scale=unit, tried=numbers, mirrored=mirrored)
    return scale, power


def search_range(x: Tensor, weight: Tensor, cuts: Sequence[tuple[float, float]], most: float, high: int) -> Sums:
    """The best scale and offset for codes 0 ... high, and sum(weight · code²), all [groups, out].

    x is [groups, group, out] and `weight` [groups, group]. The ranges that are tried cut steps off both ends of a
    group's, or extend it; each is improved twice by least squares. Offsets are at most `most`.
    """
    if not _compiled(x.shape[1], x, weight):
        return plain_codes.search_range(x, weight, cuts, most, high)
    numbers = torch.tensor(cuts, dtype=torch.float32, device="cpu")
    scale, offset, power = _found("billhook_search_range", 3, x, weight, range(high + 1), tried=numbers, most=most)
    return scale, offset, power


def _found(
    name: str,
    count: int,
    x: Tensor,
    weight: Tensor,
    points: Sequence[int],
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    tried: Tensor | None = None,
    most: float = 0.0,
    mirrored: bool = False,
) -> Sequence[Tensor]:
    """What a kernel finds for every group, `count` tensors [groups, out]."""
    groups, group, rows = x.shape
    found = torch.empty(count, groups, rows, dtype=torch.float32, device="cpu")
    tensors = [None if t is None else t.contiguous() for t in (x, weight, scale, offset, tried, found)]
    sizes = groups, group, rows, 0 if tried is None else len(tried)
    job = _SumsJob(_codes(points, mirrored), *_places(*tensors), *sizes, most)
    _run(name, ctypes.addressof(job))
    return found.unbind()


def round_columns(x: Tensor, U: Tensor, values: Values, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The codes of x [columns, out], one column after the other, and their errors divided by U's diagonal.

    A column first makes up for the errors of those before it by U [columns, columns], upper triangular. Codes are 0
    where the scale is 0 and where `zero`, bool [columns, out].
    """
    (scale, offset, points), (columns, rows) = values, x.shape
    if not _compiled(columns, x, U, scale, offset):
        return plain_codes.round_columns(x, U, values, zero)
    found, errors = (torch.empty(columns, rows, device="cpu", dtype=x.dtype) for _ in range(2))
    given = (x, U.t(), scale, inverse(scale), offset, zero)
    tensors = [None if t is None else t.contiguous() for t in given]
    sizes = columns, columns // len(scale), rows
    job = _RoundJob(_codes(points), *_places(*tensors, found, errors), *sizes)
    _run("billhook_round_columns", ctypes.addressof(job))
    return found, errors


def move_codes(
    found: Tensor, slope: Tensor, change: Tensor, gram: Tensor, values: Values, free: Tensor | None = None
) -> None:
    """Move codes [columns, out], which share a scale [out], one column after the other, to the best for the output.

    `slope` [columns, out] is the gradient of half the loss by the values, `gram` its matrix [columns, columns]. Codes
    and the `change` of the values are brought up to date in place; `slope` may be. Codes become 0 where `free`
    [columns, out] is 0.
    """
    (scale, _, points), (columns, rows) = values, found.shape
    if not _compiled(columns, found, slope, change, gram, scale, free):
        return plain_codes.move_codes(found, slope, change, gram, values, free)
    tensors = gram.contiguous(), gram.diagonal().reciprocal(), scale, inverse(scale), free, slope, found, change
    job = _MoveJob(_codes(points), *_places(*tensors), columns, rows)
    return _run("billhook_move_codes", ctypes.addressof(job))


def closest(x: Tensor, table: Tensor) -> Tensor:
    """Of every column of x, float32 [4 or 8, n], the row of `table` [points, 5 or 9] with the largest c · x + last.

    Returns int64 [n]. Of equal rows the first is found; without the kernels one of those that agree to about 1e-4.
    Raises ValueError for other shapes.
    """
    if len(x) not in (4, 8) or table.shape[1] != len(x) + 1:
        raise ValueError(f"{list(table.shape)} is no table for vectors of {len(x)} numbers")
    if not _compiled(len(x), x, table):
        return plain_codes.closest(x, table)
    x, table, index = x.contiguous(), table.contiguous(), torch.empty(x.shape[1], dtype=torch.int32)
    sizes, places = (x.shape[1], x.shape[0]), (table.data_ptr(), len(table), index.data_ptr())
    _run("billhook_closest", x.data_ptr(), *sizes, *places)
    return index.long()


def _compiled(columns: int, *tensors: Tensor | None) -> bool:
    """Whether there are kernels for these tensors, and for so many columns in a group or at once."""
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in given)
    return plain and columns <= _MOST_COLUMNS and library.active() is not None


def _run(name: str, *job: int) -> None:
    """Call a kernel with the address of its job, or its arguments."""
    kernels, path = library.active() or (None, -1)
    getattr(kernels, name)(*job, path, torch.get_num_threads())


def _places(*tensors: Tensor | None) -> list[int | None]:
    """The addresses of tensors, which the caller keeps alive. Raises ValueError for one that is not contiguous."""
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError("codes, slopes and changes must be contiguous")
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _codes(points: Sequence[int], mirrored: bool = False) -> ctypes.Structure:
    table = None if isinstance(points, range) else _table(tuple(points))
    return _Codes(None if table is None else table.data_ptr(), len(points), points[0], points[-1], mirrored)


@cache
def _table(points: tuple[int, ...]) -> Tensor:
    """The points as the kernels read them; kept, as only their address is passed."""
    return torch.tensor(points, dtype=torch.float32, device="cpu")
