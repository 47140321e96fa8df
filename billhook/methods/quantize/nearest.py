"""Round to nearest: every weight becomes the nearest point of the grid, with scales searched for the least error.

    scale = argmin Σ_j H_jj (w_j − value_j)²    over the scales that the type can store, H = XᵀX

With `weighted`; otherwise all columns count alike, and no calibration text is needed.

Limits: errors of different columns are not made to cancel each other; `gptq` does that.
"""

import torch
from torch import Tensor

from billhook.methods.quantize.grid import Grid, Quantized, Scales, safe_scale
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="round to nearest", needs=lambda weighted: ("input_norm",) if weighted else ())
def nearest(W: Tensor, stats: LayerStats, grid: Grid, *, weighted: bool = False) -> Quantized:
    """Return W [out, in] on the grid; `weighted` reads stats.input_norm [in]."""
    weight = torch.ones(W.shape[1], device=W.device)
    if weighted and stats.input_norm is not None:
        squares = stats.input_norm.square().to(W.dtype)
        weight = squares / squares.mean().clamp_min(torch.finfo(W.dtype).tiny) + 1e-6
    fitted, codes = [], torch.empty_like(W)
    for start in range(0, W.shape[1], grid.block):
        part = slice(start, start + grid.block)
        scales = grid.fit(W[:, part], weight[part])
        fitted.append(scales)
        codes[:, part] = _round(W[:, part], scales, grid, weight[part])
    return Quantized(grid, codes.to(torch.int8), Scales.join(fitted))


def _round(W: Tensor, scales: Scales, grid: Grid, weight: Tensor) -> Tensor:
    """The codes of one block of columns, float32 [out, block]."""
    scale, offset = safe_scale(scales.scale, grid.group), scales.offset
    x = W if offset is None else W - offset.repeat_interleave(grid.group, dim=1)
    return grid.nearest(x / scale, weight).where(scales.scale.repeat_interleave(grid.group, dim=1) != 0, 0)
