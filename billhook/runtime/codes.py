"""The loops that choose codes of weights, by the compiled kernels (csrc/codes.h), or without them in plain torch.

Weights are transposed, [columns, out], so that a column is a row of memory. `points` are the codes that a weight can
have, ascending: a range, or a tuple of integers between -128 and 127; a code is the nearest of them. All instruction
sets give the same codes; plain torch may differ where two codes are equally near to 1e-6.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from billhook.runtime import library, plain_codes

Sums = tuple[Tensor, Tensor, Tensor]  # of weight times code, code², and code · x; [groups, out]
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


_SumsJob = _job("x weight inverse offset sums", "groups group rows")
_RoundJob = _job("x factor scale inverse offset zero found errors", "columns group rows")
_MoveJob = _job("gram step scale inverse free found slope change", "columns rows")


def code_sums(
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    offset: Tensor | None,
    points: Sequence[int],
    *,
    mirrored: bool = False,
) -> Sums:
    """Sums over each group of weight times code, code² and code · x for the codes nearest to (x - offset) · inverse.

    x is [groups, group, out], `weight` [groups, group], `inverse` and `offset` [groups, out]; where `mirrored`, the
    points are positive and stand for both signs.
    """
    groups, group, rows = x.shape
    if not _compiled(x, weight, inverse, offset):
        return plain_codes.code_sums(x, weight, inverse, offset, points, mirrored)
    sums = torch.empty(3, groups, rows)
    job = _SumsJob(_codes(points, mirrored), *_places(x, weight, inverse, offset, sums), groups, group, rows)
    _run("billhook_code_sums", job)
    return sums[0], sums[1], sums[2]


def round_columns(
    x: Tensor,
    U: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    points: Sequence[int],
    zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes of x [columns, out], one column after the other, and their errors divided by U's diagonal.

    A column first makes up for the errors of those before it by U [columns, columns], upper triangular. `scale` and
    `offset` are [groups, out]; codes are 0 where the scale is 0 and where `zero`, bool [columns, out].
    """
    columns, rows = x.shape
    inverse = scale.reciprocal().where(scale != 0, 0)
    if not _compiled(x, U, scale, offset):
        return plain_codes.round_columns(x, U, scale, inverse, offset, points, zero)
    found, errors, factor = torch.empty_like(x), torch.empty_like(x), U.t().contiguous()
    x, zero = x.contiguous(), None if zero is None else zero.contiguous()
    places = _places(x, factor, scale, inverse, offset, zero, found, errors)
    _run("billhook_round_columns", _RoundJob(_codes(points), *places, columns, columns // len(scale), rows))
    return found, errors


def move_codes(
    found: Tensor,
    slope: Tensor,
    change: Tensor,
    gram: Tensor,
    step: Tensor,
    scale: Tensor,
    points: Sequence[int],
    free: Tensor | None = None,
) -> None:
    """Move codes [columns, out], which share `scale` [out], one column after the other, to the best for the output.

    `slope` [columns, out] is the gradient of half the loss by the values, `gram` its matrix [columns, columns] and
    `step` [columns] the inverse of its diagonal. Codes, slope and `change` of the values are brought up to date in
    place. Codes become 0 where `free` [columns, out] is 0.
    """
    columns, rows = found.shape
    inverse = scale.reciprocal().where(scale != 0, 0)
    if not _compiled(found, slope, change, gram, step, scale, free):
        return plain_codes.move_codes(found, slope, change, gram, step, scale, inverse, points, free)
    gram = gram.contiguous()
    places = _places(gram, step, scale, inverse, free, found, slope, change)
    return _run("billhook_move_codes", _MoveJob(_codes(points), *places, columns, rows))


def closest(x: Tensor, table: Tensor) -> Tensor:
    """Of every column of x, float32 [4 or 8, n], the row of `table` [points, 5 or 9] with the largest c · x + last.

    Returns int64 [n]. Of equal rows the first is found; without the kernels one of those that agree to about 1e-4.
    Raises ValueError for other shapes.
    """
    if len(x) not in (4, 8) or table.shape[1] != len(x) + 1:
        raise ValueError(f"{list(table.shape)} is no table for vectors of {len(x)} numbers")
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in (x, table))
    found = library.active() if plain else None
    if found is None:
        return plain_codes.closest(x, table)
    x, table, index = x.contiguous(), table.contiguous(), torch.empty(x.shape[1], dtype=torch.int32)
    sizes, places = (x.shape[1], x.shape[0]), (table.data_ptr(), len(table), index.data_ptr())
    found[0].billhook_closest(x.data_ptr(), *sizes, *places, found[1], torch.get_num_threads())
    return index.long()


def _compiled(*tensors: Tensor | None) -> bool:
    """Whether there are kernels for these tensors."""
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in given)
    return plain and library.active() is not None


def _run(name: str, job: ctypes.Structure) -> None:
    kernels, path = library.active() or (None, -1)
    getattr(kernels, name)(ctypes.addressof(job), path, torch.get_num_threads())


def _places(*tensors: Tensor | None) -> list[int | None]:
    """The addresses of tensors, which must be contiguous."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _codes(points: Sequence[int], mirrored: bool = False) -> ctypes.Structure:
    table = None if isinstance(points, range) else _table(tuple(points))
    return _Codes(None if table is None else table.data_ptr(), len(points), points[0], points[-1], mirrored)


@cache
def _table(points: tuple[int, ...]) -> Tensor:
    """The points as the kernels read them; kept, as only their address is passed."""
    return torch.tensor(points, dtype=torch.float32)
