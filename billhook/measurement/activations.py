"""Activation metrics: statistics of a block's Wanda scores |W_ij| · ‖X_j‖₂, all its layers together.

`outlier_ratio` is from OWL (Yin et al., ICML 2024, arXiv:2310.05175), `wanda_mean` and `wanda_median` are from DLP
(Chen et al., ICML 2025, arXiv:2505.23807).

    outlier_ratio:M   100 · fraction of the scores that exceed M times their mean
    wanda_mean        mean of the scores (DLP's published code)
    wanda_median      lower median of the scores (DLP's paper)

They are measured on the dense model with calibration text. Functions take the `weights` [out, in] of a block and the
`norms` [in], float32, of their inputs; a layer that received no tokens has None and is left out.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.plan.metrics import fact
from billhook.registry import method

Weights = Sequence[Tensor]
Norms = Sequence[Tensor | None]

BISECTIONS = 60  # more than a float32 mantissa has bits


@method(paper=fact("outlier_ratio").paper)
def outlier_ratio(weights: Weights, norms: Norms, *, m: float = 5.0) -> float:
    """Return the percentage of the block's scores that exceed `m` times their mean."""
    if not 0 < m < float("inf"):
        raise BillhookError(f"outlier_ratio:{m:g}: M must be a positive number (the paper uses 3 to 10).")
    total = sum(w.numel() for w, norm in zip(weights, norms, strict=True) if norm is not None)
    mean = wanda_mean(weights, norms)
    return 100 * sum(int((score > m * mean).sum()) for score in _scores(weights, norms)) / total


@method(paper=fact("wanda_mean").paper)
def wanda_mean(weights: Weights, norms: Norms) -> float:
    """Return the mean score."""
    sums = [(float(score.sum(dtype=torch.float64)), score.numel()) for score in _scores(weights, norms)]
    return sum(total for total, _ in sums) / sum(n for _, n in sums)


@method(paper=fact("wanda_median").paper)
def wanda_median(weights: Weights, norms: Norms) -> float:
    """Return the lower median score, found by bisection so that no layer's scores are copied or sorted."""
    scores = list(_scores(weights, norms))
    half = (sum(score.numel() for score in scores) + 1) // 2
    low, high = -1.0, max(float(score.max()) for score in scores)
    for _ in range(BISECTIONS):
        middle = (max(low, 0.0) + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if sum(int((score <= middle).sum()) for score in scores) >= half else (middle, high)
    return max(float(score[score <= high].max()) for score in scores if bool((score <= high).any()))


def _scores(weights: Weights, norms: Norms) -> Iterator[Tensor]:
    """The scores, one layer at a time, so that those of a block are not in memory together."""
    if all(norm is None for norm in norms):
        raise BillhookError(
            "No layer of a block received a calibration token, so it has no scores. Use more --samples."
        )
    return (w.abs().float() * norm for w, norm in zip(weights, norms, strict=True) if norm is not None)
