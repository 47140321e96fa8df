"""Randomized distance: how far the spectrum is from that of the same weights in random places.

Martin, Peng & Mahoney 2021, Nature Communications 12:4122 (WeightWatcher's `rand_distance`). Shuffling keeps every
weight and destroys all correlation.

    JS(p, q)   Jensen-Shannon distance, base 2, of the densities of log10 λ of W and of W shuffled

Densities are histograms of 100 equal bins over both spectra together, and one more bin for zeros.

Differences from WeightWatcher: it compares the eigenvalues themselves as if they were densities. The numbers differ;
the order of layers mostly does not.
"""

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.measurement.eigen import eigenvalues
from billhook.plan.metrics import fact
from billhook.registry import method

BINS = 100


@method(paper=fact("randomized_distance").paper)
def randomized_distance(W: Tensor, *, seed: int = 0) -> float:
    """Return the distance, in [0, 1], between the spectra of `W` [out, in] and of `W` shuffled with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = W.flatten()[torch.randperm(W.numel(), generator=generator).to(W.device)].view(W.shape)
    real, noise = eigenvalues(W).cpu(), eigenvalues(shuffled).cpu()
    positive = torch.cat([real[real > 0], noise[noise > 0]]).log10()
    if not len(positive):
        raise BillhookError("An all-zero weight has no spectrum to compare. Ignore the layer, or use another metric.")
    p, q = (_density(x, float(positive.min()), float(positive.max())) for x in (real, noise))
    middle = (p + q) / 2
    divergence = (_entropy(middle) - (_entropy(p) + _entropy(q)) / 2).clamp(0, 1)
    return float(divergence.sqrt())


def _density(evals: Tensor, low: float, high: float) -> Tensor:
    """Shares [BINS + 1] of the eigenvalues in each bin of log10, the last for zeros."""
    positive = evals[evals > 0].log10()
    counts = torch.zeros(BINS + 1, dtype=torch.float64)
    counts[0], counts[-1] = len(positive), len(evals) - len(positive)
    if high > low:
        counts[:-1] = torch.histc(positive, BINS, low, high)
    return counts / len(evals)


def _entropy(p: Tensor) -> Tensor:
    """Entropy in bits."""
    return torch.special.entr(p).sum() / torch.tensor(2.0, dtype=torch.float64).log()
