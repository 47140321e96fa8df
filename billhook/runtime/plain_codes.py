"""The loops of `codes.py` in plain torch, for other devices and dtypes, and where kernels were not compiled."""

from collections.abc import Sequence

import torch
from torch import Tensor

_AT_ONCE = 256  # vectors whose values at all points of a code book stay in the cache


def nearest_code(x: Tensor, points: Sequence[int]) -> Tensor:
    """The point nearest to x, elementwise.

    A table of points is looked up by half units: the middles between points, of which the upper is nearest, are
    multiples of ½.
    """
    if isinstance(points, range):
        return x.round().clamp_(points[0], points[-1])
    middles = torch.arange(-256, 257, device=x.device) / 2 + 0.25
    values = torch.tensor(points, dtype=x.dtype, device=x.device)
    table = values[(middles[:, None] - values).abs().argmin(1)]
    halves = (x * 2).add_(256).clamp_(0, 512).int()
    return table.index_select(0, halves.flatten()).view_as(x)


def code_sums(
    x: Tensor, weight: Tensor, inverse: Tensor, offset: Tensor | None, points: Sequence[int], mirrored: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `codes.code_sums`."""
    values = (x if offset is None else x - offset[:, None]) * inverse[:, None]
    codes = torch.copysign(nearest_code(values.abs(), points), values) if mirrored else nearest_code(values, points)
    product = (codes * x * weight[:, :, None]).sum(1)
    return (weight[:, None] @ codes)[:, 0], (weight[:, None] @ codes.square_())[:, 0], product


def round_columns(
    x: Tensor,
    U: Tensor,
    scale: Tensor,
    inverse: Tensor,
    offset: Tensor | None,
    points: Sequence[int],
    zero: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `codes.round_columns`."""
    codes, errors, group = torch.empty_like(x), torch.zeros_like(x), len(x) // len(scale)
    for at in range(len(x)):
        g = at // group
        w = torch.addmv(x[at], errors[:at].t(), U[:at, at], alpha=-1)
        w = w if offset is None else w - offset[g]
        codes[at] = nearest_code(w * inverse[g], points).mul_(scale[g] != 0)
        if zero is not None:
            codes[at].masked_fill_(zero[at], 0)
        torch.div(torch.addcmul(w, codes[at], scale[g], value=-1), U[at, at], out=errors[at])
    return codes, errors


def move_codes(
    found: Tensor,
    slope: Tensor,
    change: Tensor,
    gram: Tensor,
    step: Tensor,
    scale: Tensor,
    inverse: Tensor,
    points: Sequence[int],
    free: Tensor | None,
) -> None:
    """As `codes.move_codes`."""
    for at, code in enumerate(found):
        new = nearest_code(torch.addcmul(code, slope[at] * step[at], inverse, value=-1), points)
        if free is not None:
            new *= free[at]
        delta = (new - code).mul_(scale)
        code.copy_(new)
        change[at] += delta
        slope[at + 1 :].addcmul_(gram[at + 1 :, at, None], delta)


def closest(x: Tensor, table: Tensor) -> Tensor:
    """The row of `table` [points, dim + 1] with the largest c · x + last, int64 [n], for columns of x [dim, n].

    The number of a row takes the place of the last bits of its value, so that a maximum finds both.
    """
    numbers = torch.arange(len(table), dtype=torch.int32, device=x.device)[:, None]
    last = 2 ** (len(table) - 1).bit_length() - 1
    found = []
    for some in torch.cat([x, torch.ones_like(x[:1])]).float().split(_AT_ONCE, 1):
        values = table.float() @ some
        values.view(torch.int32).bitwise_and_(~last).bitwise_or_(numbers)
        found.append(values.amax(0).view(torch.int32) & last)
    return torch.cat(found).long().clamp_max(len(table) - 1)  # NaN may give any number
