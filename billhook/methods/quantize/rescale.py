"""Coordinate descent on the small integers of scales and minima, for the error of a layer's output.

    loss = Σ over rows (w − v) H (w − v)ᵀ,   v = scale · code + offset

An integer moves v along a direction a, the codes of its group for a multiplier and ones for a minimum, in steps of a
float16 of the file. With r = (v − w) H the best move is −r·a / (a H a); the integer becomes the nearest in range
if that lowers the loss. A multiplier that would become 0 stays, as codes without a scale mean nothing.
"""

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Scales, dequantize
from billhook.methods.quantize.minimum import KMinimum
from billhook.methods.quantize.symmetric import SuperBlock


def rescale(W: Tensor, H: Tensor, codes: Tensor, scales: Scales, grid: SuperBlock | KMinimum) -> Scales:
    """Scales with a loss that is not higher, for every row of W [out, in]; codes float [out, in], H [in, in]."""
    D = dequantize(codes, scales) - W
    parts = dict(scales.parts)
    steps = {}
    for part, base, factor in grid.integers:
        parts[part] = parts[part].clone()
        steps[part] = parts[base].to(W.dtype).repeat_interleave(grid.block // grid.group, dim=1) * factor
    for g in range(scales.scale.shape[1]):
        S = slice(g * grid.group, (g + 1) * grid.group)
        r, block = D @ H[:, S], H[S, S]
        for part, step in steps.items():
            along = codes[:, S] if part == "multipliers" else torch.ones_like(r)
            old, unit, slope, curve = parts[part][:, g].to(W.dtype), step[:, g], (r * along).sum(1), along @ block
            curvature = (curve * along).sum(1)
            new = grid.multipliers.nearest(old - slope / (curvature * unit))
            delta = (new - old) * unit
            accept = (delta * (2 * slope + delta * curvature) < 0) & ((new != 0) | (part == "minima"))
            parts[part][:, g] = new.where(accept, old).to(torch.int8)
            delta = delta.where(accept, 0)[:, None]
            D[:, S] += delta * along
            r += delta * curve
    return grid.decoded(parts)
