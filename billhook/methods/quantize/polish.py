"""Coordinate descent on codes, and least squares on scales, for the error of a layer's output.

    loss = Σ over rows (w − v) H (w − v)ᵀ,   v = scale · code + offset

A sweep visits the codes of every row from left to right. With r = (v − w) H, the best value of the columns S of a code,
all others being fixed, is v_S − r_S H_SS⁻¹; the code moves to the nearest point if that lowers the loss. Before each
further sweep the scales follow the codes: free ones become the best ones, in every row where that lowers the loss once
they are stored; integers move one by one (`billhook.methods.quantize.rescale`).
"""

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Grid, Quantized, Scales, dequantize, safe_scale
from billhook.methods.quantize.minimum import KMinimum
from billhook.methods.quantize.rescale import rescale
from billhook.methods.quantize.symmetric import SuperBlock

_PANEL = 64  # columns for which r is computed by one product


def polish(W: Tensor, H: Tensor, start: Quantized, sweeps: int, zero: Tensor | None = None) -> Quantized:
    """Return codes and scales with a loss that is not higher, for every row of W [out, in]; H [in, in].

    Codes do not change where `zero`, bool [out, in].
    """
    grid, codes, scales = start.grid, start.codes.to(W.dtype), start.scales
    for sweep in range(sweeps):
        if sweep and isinstance(grid, SuperBlock | KMinimum):
            scales = rescale(W, H, codes, scales, grid)
        elif sweep and scales.offset is None:
            scales = _refit(W, H, codes, scales, grid)
        if not _sweep(W, H, codes, scales, grid, zero):
            break
    return Quantized(grid, codes.to(torch.int8), scales)


def _sweep(W: Tensor, H: Tensor, codes: Tensor, scales: Scales, grid: Grid, zero: Tensor | None) -> bool:
    """Improve `codes` float [out, in] in place; whether any code changed."""
    step = grid.step
    scale, usable = safe_scale(scales.scale, grid.group), (scales.scale != 0).repeat_interleave(grid.group, dim=1)
    free = usable if zero is None else usable & ~zero
    offset = W.new_zeros(()) if scales.offset is None else scales.offset.repeat_interleave(grid.group, dim=1)
    offset = offset.expand_as(W)
    V = codes * scale * usable + offset
    D = V - W
    changed = torch.zeros((), dtype=torch.bool, device=W.device)
    for first in range(0, W.shape[1], _PANEL):
        panel = slice(first, min(first + _PANEL, W.shape[1]))
        R, inside = (D @ H[:, panel]).t().contiguous(), H[panel, panel]
        for at in range(0, panel.stop - first, step):
            here, S = slice(at, at + step), slice(first + at, first + at + step)
            r, block = R[here], inside[here, here]
            move = r / block if step == 1 else torch.linalg.solve(block, r)
            x = (V[:, S] - move.t() - offset[:, S]) / scale[:, S]
            new = grid.nearest(x, block.diagonal()).where(free[:, S], codes[:, S])
            delta = ((new - codes[:, S]) * scale[:, S]).t()
            gain = (delta * (2 * r + block @ delta)).sum(0)
            accept = gain < 0
            delta = delta * accept
            codes[:, S] = new.where(accept[:, None], codes[:, S])
            D[:, S] += delta.t()
            V[:, S] += delta.t()
            R[at + step :].addmm_(inside[at + step :, here], delta)
            changed |= accept.any()
    return bool(changed)


def _refit(W: Tensor, H: Tensor, codes: Tensor, scales: Scales, grid: Grid) -> Scales:
    """The scales [out, groups] with the least loss for these codes, of the rows for which they lower it."""
    out, groups = scales.scale.shape
    if grid.scales(scales.scale) is None:
        return scales
    A = torch.empty(out, groups, groups, dtype=W.dtype, device=W.device)
    wanted = (W @ H * codes).view(out, groups, -1).sum(2)
    for g in range(groups):
        part = slice(g * grid.group, (g + 1) * grid.group)
        A[:, g] = (codes[:, part] @ H[part] * codes).view(out, groups, -1).sum(2)
    diagonal = A.diagonal(dim1=1, dim2=2)
    diagonal += diagonal.mean(1, keepdim=True) * 1e-6 + (diagonal <= 0)
    L, failed = torch.linalg.cholesky_ex(A)
    solved = torch.cholesky_solve(wanted[:, :, None], L)[:, :, 0]
    new = grid.scales(solved.where((failed[:, None] == 0) & solved.isfinite() & (solved != 0), scales.scale))
    assert new is not None
    old_loss, new_loss = (_loss(W, H, dequantize(codes, s)) for s in (scales, new))
    return grid.scales(new.scale.where((new_loss < old_loss)[:, None], scales.scale)) or scales


def _loss(W: Tensor, H: Tensor, V: Tensor) -> Tensor:
    """(w − v) H (w − v)ᵀ of every row, [out]."""
    D = W - V
    return ((D @ H) * D).sum(1)
