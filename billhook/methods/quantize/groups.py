"""The columns of a block in groups, and sums over them from which scales follow by least squares.

Tensors are [groups, group, out], so that sums over a group add whole rows of memory. Weights are divided by the largest
of their row, so that no square can overflow or vanish; `weight` is divided by its mean.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Scales
from billhook.runtime.codes import Sums, Values, code_sums
from billhook.runtime.plain_codes import sums_of

ROWS = 4096  # rows at a time, so that what is computed for a block stays in the cache
_HALF = 65504.0  # the largest float16


class Groups:
    """W float32 [out, block] as `x` [groups, group, out], `weight` as [groups, group], and `peak` [out]."""

    def __init__(self, W: Tensor, weight: Tensor, group: int) -> None:
        out, block = W.shape
        x = W.t().contiguous().view(block // group, group, out)
        largest = x.abs().amax((0, 1))
        self.peak = largest.where(largest > 0, 1)
        self.x = x / self.peak
        floor = torch.finfo(torch.float32).tiny
        self.weight = (weight / weight.mean().clamp_min(floor) + 1e-6).view(-1, group)

    @cached_property
    def wx(self) -> Tensor:
        """Weight times x, [groups, group, out]."""
        return self.x * self.weight[:, :, None]

    @cached_property
    def sum_w(self) -> Tensor:
        """The sums of the weights of each group, [groups, out]."""
        return self.weight.sum(1, keepdim=True).expand(-1, self.x.shape[2])

    @cached_property
    def sum_wx(self) -> Tensor:
        """The sums of weight times x, [groups, out]."""
        return self.wx.sum(1)

    @property
    def largest(self) -> Tensor:
        """The weight of each group that is farthest from 0, [groups, out]."""
        return self.x.gather(1, self.x.abs().argmax(1, keepdim=True))[:, 0]

    def sums(self, scale: Tensor, offset: Tensor | None, points: Sequence[int]) -> Sums:
        """Sums [groups, out] of weight times code, code² and code · x for the codes that scales give."""
        return code_sums(self.x, self.weight, Values(scale, offset, points))

    def sums_of(self, codes: Tensor) -> Sums:
        """The same for codes [groups, group, out], which are overwritten."""
        return sums_of(codes, self.weight, self.wx)

    def half(self, scale: Tensor, unit: float = 1.0) -> Tensor:
        """`scale` [..., out] when it is stored in float16 in units of `unit`, not above the largest float16."""
        return to_half(scale * (self.peak / unit)) / (self.peak / unit)

    def stored(self, scale: Tensor, unit: float = 1.0) -> Tensor:
        """The float16 that `half` stands for, [out, 1] or [out, rows of scale]."""
        return to_half(scale * (self.peak / unit)).half().view(-1, len(self.peak)).t().contiguous()


def by_rows(fit: Callable[[Tensor, Tensor], Scales], W: Tensor, weight: Tensor) -> Scales:
    """The scales of a block W [out, block], some rows at a time."""
    return Scales.join([fit(rows, weight) for rows in W.split(ROWS)], dim=0)


def to_half(x: Tensor) -> Tensor:
    """x rounded to float16, not above its largest number, in the dtype of x."""
    return x.clamp(-_HALF, _HALF).half().to(x.dtype)
