"""Coordinate descent on codes and on the stored numbers of scales, for the error of a layer's output.

    loss = Σ over rows (w − v) H (w − v)ᵀ,   v = scale · code + offset

A sweep visits the groups of every row from left to right. With r = (v − w) H, first the stored numbers of the group's
scale and minimum (`Term`s of the grid) move: a number changes v along a direction a, the codes of the group or ones,
and its best change is −r·a / (a H a). Then the best value of the columns S of each code, all others being fixed, is
v_S − r_S H_SS⁻¹. Both move to the nearest number or point that can be stored if that lowers the loss. A scale that
would become 0 stays, as codes without a scale mean nothing.

Tensors are transposed, [in, out], so that a column of the weight is a row of memory. r is computed for a panel of
groups by one product, and brought up to date inside it.
"""

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Quantized
from billhook.runtime.codes import Values, move_codes
from billhook.runtime.plain_codes import inverse

_PANEL = 128  # columns for which r is computed by one product


def polish(W: Tensor, H: Tensor, start: Quantized, sweeps: int, zero: Tensor | None = None) -> Quantized:
    """Return codes and scales with a loss that is not higher, for every row of W [out, in]; H [in, in].

    Codes do not change where `zero`, bool [out, in].
    """
    grid, state = start.grid, _State(W, H, start, zero)
    width = grid.group * max(1, _PANEL // grid.group)
    panels = [slice(at, min(at + width, len(H))) for at in range(0, len(H), width)]
    for _ in range(sweeps):
        if sum(state.improve(panel) for panel in panels) == 0:
            break
    parts = {name: part.t().to(start.scales.parts[name].dtype).contiguous() for name, part in state.parts.items()}
    return Quantized(grid, state.codes.t().to(torch.int8).contiguous(), grid.decoded(parts))


class _State:
    """Codes and the parts of scales as they are now, float [columns or groups, out]."""

    def __init__(self, W: Tensor, H: Tensor, start: Quantized, zero: Tensor | None) -> None:
        grid = start.grid
        self.grid, self.H = grid, H
        self.codes = start.codes.t().to(W.dtype, memory_format=torch.contiguous_format)
        self.free = None if zero is None else (~zero).t().to(W.dtype).contiguous()
        self.D = (start.decode(W.dtype) - W).t().contiguous()
        self.parts = {name: part.t().to(W.dtype).contiguous() for name, part in start.scales.parts.items()}
        self.scale = start.scales.scale.t().contiguous()
        if grid.step > 1:
            ends = range(grid.step, len(H) + 1, grid.step)
            self.inverses = torch.linalg.inv(torch.stack([H[to - grid.step : to, to - grid.step : to] for to in ends]))

    def improve(self, panel: slice) -> bool:
        """Improve the groups of a panel of columns in turn; whether anything changed."""
        R, inside, group = self.H[panel] @ self.D, self.H[panel, panel], self.grid.group
        move_codes = self._move_numbers if self.grid.step == 1 else self._move_vectors
        change = torch.zeros_like(R)
        for at in range(0, len(R), group):
            to = at + group
            r = torch.addmm(R[at:to], inside[at:to, :at], change[:at])
            here, block = (panel.start + at) // group, inside[at:to, at:to]
            self._move_terms(here, r, block, change[at:to])
            move_codes(here, r, block, change[at:to])
        self.D[panel] += change
        return bool(change.any())

    def _move_terms(self, g: int, r: Tensor, block: Tensor, change: Tensor) -> None:
        """Move the stored numbers of group `g`, and r and change [group, out] with them."""
        codes, ratio = self.codes[g * self.grid.group :][: self.grid.group], self.grid.block // self.grid.group
        for term in self.grid.terms:
            number = self.parts[term.part][g]
            along = torch.ones_like(codes) if term.constant else codes
            curve = block @ along
            slope, curvature = (r * along).sum(0), (curve * along).sum(0)
            unit = self.parts[term.base][g // ratio] * term.factor if term.base else torch.ones_like(slope)
            new = term.nearest(number - slope / (curvature * unit))
            delta = (new - number) * unit
            accept = delta * (2 * slope + delta * curvature) < 0
            accept = accept if term.constant else accept & (new != 0)
            number.copy_(new.where(accept, number))
            delta = delta.where(accept, 0)
            if not term.constant:
                self.scale[g] += delta
            change.addcmul_(along, delta)
            r.addcmul_(curve, delta)

    def _move_numbers(self, g: int, r: Tensor, block: Tensor, change: Tensor) -> None:
        """Move the codes of group `g`, one column each, and r and change [group, out] with them."""
        columns = slice(g * self.grid.group, (g + 1) * self.grid.group)
        free = None if self.free is None else self.free[columns]
        move_codes(self.codes[columns], r, change, block, Values(self.scale[g], None, self.grid.points), free)

    def _move_vectors(self, g: int, r: Tensor, block: Tensor, change: Tensor) -> None:
        """Move the codes of group `g`, vectors of `step` columns; r and change are [group, out]."""
        scale, step, first = self.scale[g], self.grid.step, g * self.grid.group
        for at in range(0, self.grid.group, step):
            S, codes = slice(at, at + step), self.codes[first + at : first + at + step]
            x = torch.addcmul(codes, self.inverses[(first + at) // step] @ r[S], inverse(scale), value=-1)
            new = self.grid.nearest(x.t(), block.diagonal()[S]).t()
            delta = (new - codes).mul_(scale)
            accept = (delta * torch.addmm(r[S], block[S, S], delta, alpha=0.5)).sum(0) < 0
            delta *= accept
            codes.copy_(new.where(accept, codes))
            change[S] += delta
            r[at + step :].addmm_(block[at + step :, S], delta)
