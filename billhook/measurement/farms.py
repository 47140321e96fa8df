"""alpha_farms, alpha_farms_mid: the tail exponent without the bias of the matrix's shape.

Hu et al., "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias" (FARMS), ICML 2025, arXiv:2506.06280.
The exponent of a random matrix depends on its aspect ratio, so exponents of layers of unlike shapes cannot be compared.
Here the spectrum is that of square windows (aspect ratio 1) of side m = min(2000, out, in), moved over the matrix in
equal steps, `windows` places along each side (one where there is no room to move); the squared singular values of all
windows together are then fitted as for `alpha_peak` (or `alpha_mid`).

The published code uses 10 to 15 places along each side. The default here is 5, which covers a 4096 x 11008 weight;
windows overlap. On matrices without a power law (noise) the cut of least KS distance wanders, in windows as in the
whole; there `alpha_farms_mid` shows that the bias is gone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.measurement.eigen import eigenvalues
from billhook.measurement.tails import Spectrum
from billhook.plan.metrics import fact
from billhook.registry import method

SIDE = 2000


@method(paper=fact("alpha_farms").paper)
def alpha_farms(W: Tensor, *, windows: int = 5) -> float:
    """Exponent of the pooled spectrum of at most `windows` x `windows` square windows of `W` [out, in]."""
    return _pooled(W, windows).fit("peak").alpha


@method(paper=fact("alpha_farms_mid").paper)
def alpha_farms_mid(W: Tensor, *, windows: int = 5) -> float:
    """Exponent of the upper half of the pooled spectrum."""
    return _pooled(W, windows).fit("mid").alpha


def _pooled(W: Tensor, windows: int) -> Spectrum:
    if windows < 1:
        raise BillhookError(f"alpha_farms: windows must be at least 1 along each side, got {windows}.")
    return Spectrum(torch.cat([eigenvalues(part) for part in squares(W, windows)]).sort().values)


def squares(W: Tensor, windows: int) -> Iterator[Tensor]:
    """The square windows of `W`, views [m, m] with m = min(2000, out, in), evenly spaced from edge to edge."""
    side = min(SIDE, *W.shape)
    for row in _starts(W.shape[0] - side, windows):
        for column in _starts(W.shape[1] - side, windows):
            yield W[row : row + side, column : column + side]


def _starts(room: int, windows: int) -> list[int]:
    """Where windows begin: `windows` places over `room` positions to move by, without repetition."""
    return sorted({round(i * room / max(windows - 1, 1)) for i in range(windows)})
