"""OWL's outlier ratio: how many of a block's Wanda scores stand far above the rest.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv:2310.05175, equation 2. Measured on the dense model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.errors import BillhookError

DEFAULT_M = 5.0


def parse_m(metric: str) -> float:
    """The M of `outlier_ratio` or `outlier_ratio:M`; raises BillhookError unless it is a positive number."""
    _, _, text = metric.partition(":")
    try:
        m = float(text) if text else DEFAULT_M
    except ValueError:
        m = 0.0
    if not 0 < m < float("inf"):
        raise BillhookError(f"{metric}: M must be a positive number, such as outlier_ratio:5 (the paper uses 3 to 10).")
    return m


def outlier_ratio(weights: Sequence[Tensor], norms: Sequence[Tensor | None], m: float) -> float:
    """The outlier ratio of one block, in percent.

    D = 100 * share of the block's scores |W_ij| ||X_j||_2 that exceed `m` times their mean, all layers of the block together.
    `weights` are [out, in], `norms` [in] float32; a layer that saw no tokens is left out.
    """
    scores = [w.abs().float() * norm for w, norm in zip(weights, norms, strict=True) if norm is not None]
    total = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / total
    return 100 * sum(int((score > m * mean).sum()) for score in scores) / total
