"""Quantiles of the scores of each layer: what allocators need to find one threshold for the whole model, without the
model.

The k-th of LEVELS + 1 numbers is the score below which a share k / LEVELS of the layer's weights lies; the first is the
least and the last the largest score. Between two quantiles the share is interpolated linearly, which is exact at the
quantiles and, for smooth distributions, good to about 1e-4 elsewhere but for the last step before the largest score.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.plan.metrics import fact
from billhook.registry import method

LEVELS = 128


def quantiles(ascending: Tensor) -> list[float]:
    """The LEVELS + 1 quantiles of sorted scores [n]."""
    n = len(ascending)
    places = [min(n - 1, round(k * n / LEVELS)) for k in range(LEVELS + 1)]
    values: list[float] = ascending[torch.tensor(places, device=ascending.device)].double().tolist()
    return values


@method(paper=fact("magnitude_quantiles").paper)
def magnitude_quantiles(W: Tensor) -> list[float]:
    """Of |W|."""
    return quantiles(W.float().abs().flatten().sort().values)


@method(paper=fact("lamp_quantiles").paper)
def lamp_quantiles(W: Tensor) -> list[float]:
    """Of the square roots of the LAMP scores w_u^2 / sum of w_v^2 over the weights v of the layer that are not smaller.

    The largest weight has score 1. The root changes no order, and is what can be interpolated near zero.
    """
    squares = W.double().flatten().square().sort().values
    rest = squares.flip(0).cumsum(0).flip(0)
    return quantiles((squares / rest.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


@method(paper=fact("wanda_quantiles").paper)
def wanda_quantiles(weights: Sequence[Tensor], norms: Sequence[Tensor | None]) -> list[float]:
    """Of |W_ij| ||X_j||_2 of one layer."""
    (W,), (norm,) = weights, norms
    if norm is None:
        raise BillhookError(
            "An expert received no calibration token: its scores do not exist. Use more --samples, or "
            "magnitude_quantiles."
        )
    return quantiles((W.abs().float() * norm).flatten().sort().values)
