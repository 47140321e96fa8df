"""Quantiles: curves of each layer's scores, from which a common threshold is found without the model.

    q_k = the score below which the fraction k / 128 of the layer's weights lies,   k = 0 … 128

The first is the smallest and the last the largest score. Between two quantiles the fraction is interpolated linearly.
That is exact at the quantiles and, for smooth distributions, good to about 1e-4 elsewhere, except for the last step
before the largest score. `magnitude_quantiles` and `wanda_quantiles` are read by `global`, `lamp_quantiles` by `lamp`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.plan.metrics import fact
from billhook.registry import method

LEVELS = 128


def quantiles(ascending: Tensor) -> list[float]:
    """Return the LEVELS + 1 quantiles of sorted scores [n]."""
    n = len(ascending)
    places = [min(n - 1, round(k * n / LEVELS)) for k in range(LEVELS + 1)]
    values: list[float] = ascending[torch.tensor(places, device=ascending.device)].double().tolist()
    return values


@method(paper=fact("magnitude_quantiles").paper)
def magnitude_quantiles(W: Tensor) -> list[float]:
    """Return the quantiles of |W|."""
    return quantiles(W.float().abs().flatten().sort().values)


@method(paper=fact("lamp_quantiles").paper)
def lamp_quantiles(W: Tensor) -> list[float]:
    """Return the quantiles of the roots of the LAMP scores w_u^2 / sum of w_v^2 over the weights v not smaller than u.

    The largest weight has score 1. The root keeps the order and makes interpolation near zero possible.
    """
    squares = W.double().flatten().square().sort().values
    rest = squares.flip(0).cumsum(0).flip(0)
    return quantiles((squares / rest.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


@method(paper=fact("wanda_quantiles").paper)
def wanda_quantiles(weights: Sequence[Tensor], norms: Sequence[Tensor | None]) -> list[float]:
    """Return the quantiles of |W_ij| ||X_j||_2 of one layer."""
    (W,), (norm,) = weights, norms
    if norm is None:
        raise BillhookError("An expert received no calibration token, so it has no scores. Use more --samples.")
    return quantiles((W.abs().float() * norm).flatten().sort().values)
