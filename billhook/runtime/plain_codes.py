"""The loops of `codes.py` in plain torch, for other devices and dtypes, and where kernels were not compiled; and the
steps of least squares on sums that quantizers take after them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 256  # vectors whose values at all points of a code book stay in the cache


class Values(NamedTuple):
    """What codes stand for, scale · code + offset: `scale` and `offset` are [groups, out], or [out] for one group."""

    scale: Tensor
    offset: Tensor | None
    points: Sequence[int]


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
    halves = (x * 2).add_(256).nan_to_num_(0).clamp_(0, 512).int()
    return table.index_select(0, halves.flatten()).view_as(x)


def code_sums(x: Tensor, weight: Tensor, values: Values, *, mirrored: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """As `codes.code_sums`; where `mirrored`, points stand for both signs."""
    scale, offset, points = values
    v = (x if offset is None else x - offset[:, None]) * inverse(scale)[:, None]
    codes = torch.copysign(nearest_code(v.abs(), points), v) if mirrored else nearest_code(v, points)
    return sums_of(codes, weight, x * weight[:, :, None])


def sums_of(codes: Tensor, weight: Tensor, wx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [groups, out] of weight times code, code² and code · x for codes [groups, group, out], which are
    overwritten; `wx` is weight times x."""
    product = (codes * wx).sum(1)
    return (weight[:, None] @ codes)[:, 0], (weight[:, None] @ codes.square_())[:, 0], product


def search_scale(
    x: Tensor, weight: Tensor, unit: Tensor, tried: Sequence[float], points: Sequence[int], mirrored: bool
) -> tuple[Tensor, Tensor]:
    """As `codes.search_scale`."""
    found: tuple[Tensor, ...] = ()
    for factor in tried:
        scale = unit * factor
        for _ in range(2):
            _, power, product = code_sums(x, weight, Values(scale, None, points), mirrored=mirrored)
            scale = quotient(product, power)
            found = better((-product * scale, scale, power), found)
    return found[1], found[2]


def search_range(
    x: Tensor, weight: Tensor, cuts: Sequence[tuple[float, float]], most: float, high: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `codes.search_range`."""
    total = weight.sum(1, keepdim=True).to(x.dtype), (x * weight[:, :, None]).sum(1)
    low = x.amin(1).clamp_max(most)
    span = x.amax(1) - low
    found: tuple[Tensor, ...] = ()
    for below, above in cuts:
        scale = span / (high + below + above)
        offset = (low + below * scale).clamp_max(most)
        for _ in range(2):
            sums = code_sums(x, weight, Values(scale, offset, range(high + 1)))
            scale, offset = solve_range(*total, sums, most)
            found = better((range_error(*total, sums, scale, offset), scale, offset, sums[1]), found)
    return found[1], found[2], found[3]


def solve_range(weight: Tensor, wx: Tensor, sums: tuple[Tensor, Tensor, Tensor], most: float) -> tuple[Tensor, Tensor]:
    """The best scale and offset for codes with these sums; one is 0 where codes are equal or it would be above `most`.

    `weight` and `wx` are the sums over each group of the weights, and of weight times x.
    """
    wc, wcc, wcx = sums
    determinant = weight * wcc - wc.square()
    scale = (weight * wcx - wx * wc) / determinant
    offset = (wx * wcc - wc * wcx) / determinant
    regular = (determinant > 1e-6 * weight * wcc) & (offset <= most) & (scale >= 0)
    mean = (wx / weight).clamp_max(most).where(wcc <= 0, 0)
    return scale.where(regular, quotient(wcx, wcc)), offset.where(regular, mean)


def range_error(
    weight: Tensor, wx: Tensor, sums: tuple[Tensor, Tensor, Tensor], scale: Tensor, offset: Tensor
) -> Tensor:
    """sum(weight · (x - scale · code - offset)²) less sum(weight · x²), [groups, out]."""
    wc, wcc, wcx = sums
    cross = offset * (offset * weight - 2 * wx + 2 * scale * wc)
    return scale.square() * wcc - 2 * scale * wcx + cross


def better(new: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Where the first tensor, the error, is less in `new` than in `found`, the tensors of `new`."""
    if not found:
        return new
    less = new[0] < found[0]
    return tuple(a.where(less, b) for a, b in zip(new, found, strict=True))


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of (almost) 0."""
    return scale.reciprocal().where(scale.abs() > 1e-30, 0)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is not positive."""
    return a / b.where(b > 0, 1) * (b > 0)


def round_columns(x: Tensor, U: Tensor, values: Values, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `codes.round_columns`."""
    scale, offset, points = values
    codes, errors, group = torch.empty_like(x), torch.zeros_like(x), len(x) // len(scale)
    for at in range(len(x)):
        g = at // group
        w = torch.addmv(x[at], errors[:at].t(), U[:at, at], alpha=-1)
        w = w if offset is None else w - offset[g]
        codes[at] = nearest_code(w * inverse(scale[g]), points).mul_(scale[g] != 0)
        if zero is not None:
            codes[at].masked_fill_(zero[at], 0)
        torch.div(torch.addcmul(w, codes[at], scale[g], value=-1), U[at, at], out=errors[at])
    return codes, errors


def move_codes(found: Tensor, slope: Tensor, change: Tensor, gram: Tensor, values: Values, free: Tensor | None) -> None:
    """As `codes.move_codes`."""
    scale, _, points = values
    step, one = gram.diagonal().reciprocal(), inverse(scale)
    for at, code in enumerate(found):
        new = nearest_code(torch.addcmul(code, slope[at] * step[at], one, value=-1), points)
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
