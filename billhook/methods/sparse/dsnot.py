"""DSnoT: exchange pruned and kept weights of Wanda's mask until the mean output is close to that of the dense layer.

Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024, arXiv:2310.08915.

    e_r = Σ W_rj · E[x_j]   over the removed weights j of row r

A cycle restores the removed weight with the largest sign(e_r) · W_rj · E[x_j] / Var[x_j]. It removes the kept weight
with the smallest |W_rj| · ‖X_j‖₂ among those whose removal moves e_r towards zero. Under N:M, both weights are of the
same group. A row is finished when |e_r| is at most `threshold` times its first value, when an exchange would not lower
|e_r|, or after `cycles` cycles. Kept weights are not updated.

Differences from the published code:

* The threshold is relative to the row's first error; there it is 0.1 in units of the outputs.
* An exchange that would raise |e_r| ends the row, so that no row's mean error ends above Wanda's. The published code
  makes such exchanges.

Measured agreement: not compared with published code.

Limits: it corrects the mean of the outputs, not their variance.
"""

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Zhang et al. 2024, arXiv:2310.08915", needs=("input_norm", "input_mean"), group="row")
def dsnot(W: Tensor, stats: LayerStats, select: Select, *, cycles: int = 50, threshold: float = 0.1) -> Tensor:
    """Return W [out, in] with zeros where the exchanged mask removes; reads stats.input_norm and stats.input_mean, both
    [in].
    """
    if cycles < 0 or not 0 <= threshold <= 1:
        raise BillhookError(f"dsnot: cycles={cycles} must be 0 or more and threshold={threshold:g} in [0, 1].")
    assert stats.input_norm is not None
    assert stats.input_mean is not None
    score = W.abs() * stats.input_norm
    keep = select(score)
    effect = W * stats.input_mean  # contribution of each weight to the row's mean output
    variance = stats.input_norm**2 * (stats.sequences / max(stats.tokens, 1)) - stats.input_mean**2
    gain = effect / variance.clamp_min(1e-12)
    group = W.shape[1] if select.keep_of is None else select.keep_of[1]
    error = (effect * ~keep).sum(1)
    enough = threshold * error.abs()
    for _ in range(cycles):
        todo = (error.abs() > enough).nonzero()[:, 0]
        if not len(todo):
            break
        back, out, after = _exchange(keep[todo], effect[todo], gain[todo], score[todo], error[todo], group)
        better = after.abs() < error[todo].abs()
        enough[todo[~better]] = torch.inf
        rows = todo[better]
        keep[rows, back[better]] = True
        keep[rows, out[better]] = False
        error[rows] = after[better]
    return W.masked_fill(~keep, 0)


def _exchange(
    keep: Tensor, effect: Tensor, gain: Tensor, score: Tensor, error: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For every row: the column to restore, the column to remove, and the error after that (infinite if none fits)."""
    sign = error.sign()[:, None]
    best, back = (sign * gain).masked_fill(keep, -torch.inf).max(1)
    rows = torch.arange(len(keep), device=keep.device)
    columns = torch.arange(keep.shape[1], device=keep.device)
    partner = keep & (columns // group == (back // group)[:, None]) & (sign * effect < 0)
    least, out = score.masked_fill(~partner, torch.inf).min(1)
    after = error - effect[rows, back] + effect[rows, out]
    return back, out, after.masked_fill(~(best > 0) | least.isinf(), torch.inf)
