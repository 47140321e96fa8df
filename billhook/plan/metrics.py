"""Facts about each metric: name, sign, source, and what it is computed from. No torch.

A metric is one number per layer, a column of the table, from which an allocator decides how much to prune. `sign` is
+1 where a larger value means more sparsity, -1 where it means less.

Shape of the spectrum: a heavy tail (small alpha, low entropy, low stable rank) marks a well-trained layer, so these are
+1 (AlphaPruning, arXiv:2410.10912: smaller alpha = less sparsity). Scale: a layer with a large norm matters more, so
the norms are -1. The published AlphaPruning code uses +1 for every metric it can be given.

A parameter follows the name after a colon: `outlier_ratio:5`, `alpha_peak:repaired`. `reads` are the arguments of the
metric's function: `spectrum` (Spectrum), `weight` (W), `activations` (weights and input norms of a block), `loss` and
`trial` (model, layers, batches; a `trial` needs the whole model in memory). `billhook.measurement` has the functions.

A *curve* is a list of numbers per layer: the quantiles of its scores, from which `global` and `lamp` find the one
threshold that meets the budget, or those of its spectrum, which reports draw. Curves are measured by name like metrics.
"""

from dataclasses import dataclass
from typing import Literal

from billhook.errors import BillhookError
from billhook.registry import hint

Sign = Literal[1, -1]
Reads = Literal["spectrum", "weight", "activations", "loss", "trial"]

_ALPHA_PRUNING = "AlphaPruning, Lu et al. 2024, arXiv:2410.10912"
_WEIGHT_WATCHER = "Martin, Peng & Mahoney 2021, Nature Communications 12:4122 (WeightWatcher)"
_STABLE_RANK = "Rudelson & Vershynin 2007, J. ACM 54(4):21"
_OWL = "OWL, Yin et al. 2024, arXiv:2310.05175"
_DLP = "DLP, Chen et al. 2025, arXiv:2505.23807"
_FARMS = "FARMS, Hu et al. 2025, arXiv:2506.06280"
_MP = "Martin & Mahoney 2021, JMLR 22:165"
_LAMP = "LAMP, Lee et al. 2021, arXiv:2010.07611"
_HAN = "Han et al. 2015, arXiv:1506.02626"
_WANDA = "Sun et al. 2023, arXiv:2306.11695"
_BLOCK: tuple[Reads, bool] = ("activations", True)


@dataclass(frozen=True)
class Metric:
    """Facts about one metric. A metric of a whole `block` has one value for all its layers."""

    name: str
    sign: Sign
    paper: str
    summary: str
    reads: Reads = "spectrum"
    block: bool = False

    @property
    def spectral(self) -> bool:
        """Whether it is computed from the spectrum of the weight."""
        return self.reads == "spectrum"

    @property
    def needs_text(self) -> bool:
        """Whether it depends on the model's activations or loss."""
        return self.reads in ("activations", "loss", "trial")


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


FACTS = _by_name(
    Metric("alpha_peak", 1, _ALPHA_PRUNING, "tail exponent, cut up to the mode of the spectrum, least KS distance"),
    Metric("alpha_mid", 1, _ALPHA_PRUNING, "tail exponent of the upper half of the spectrum"),
    Metric("alpha_ks", 1, _ALPHA_PRUNING, "tail exponent, least KS distance over all cuts"),
    Metric("entropy", 1, _WEIGHT_WATCHER, "entropy of the spectrum over ln(rank): 1 is flat, 0 is rank one"),
    Metric("stable_rank", 1, _STABLE_RANK, "sum of the eigenvalues over the largest"),
    Metric("alpha_hat", 1, _WEIGHT_WATCHER, "alpha_ks x log10 of the largest eigenvalue"),
    Metric("log_alpha_norm", 1, _WEIGHT_WATCHER, "log10 of the sum of eigenvalues ^ alpha_ks"),
    Metric("spectral_norm", -1, _WEIGHT_WATCHER, "largest eigenvalue of W^T W"),
    Metric("log_spectral_norm", -1, _WEIGHT_WATCHER, "log10 of the largest eigenvalue of W^T W"),
    Metric("frobenius_sq", -1, _WEIGHT_WATCHER, "sum of squared weights"),
    Metric("log_norm", -1, _WEIGHT_WATCHER, "log10 of the sum of squared weights"),
    Metric(
        "mp_softrank", 1, _MP, "edge of the spectrum of random weights of the same shape and size, over the largest"
    ),
    Metric("alpha_peak_ks", 1, _ALPHA_PRUNING, "KS distance of the fit of alpha_peak from a power law"),
    Metric("alpha_mid_ks", 1, _ALPHA_PRUNING, "KS distance of the fit of alpha_mid"),
    Metric("alpha_ks_ks", 1, _ALPHA_PRUNING, "KS distance of the fit of alpha_ks"),
    Metric("alpha_farms", 1, _FARMS, "alpha_peak of square windows, without bias from the weight's shape", "weight"),
    Metric("alpha_farms_mid", 1, _FARMS, "alpha_mid of square windows, without bias from the weight's shape", "weight"),
    Metric(
        "randomized_distance", -1, _WEIGHT_WATCHER, "distance of the spectrum to that of shuffled weights", "weight"
    ),
    Metric("outlier_ratio", -1, _OWL, "% of a block's scores above M times their mean (`outlier_ratio:M`)", *_BLOCK),
    Metric("wanda_mean", 1, _DLP, "mean of a block's |W| x input norm", *_BLOCK),
    Metric("wanda_median", 1, _DLP, "median of a block's |W| x input norm", *_BLOCK),
    Metric(
        "block_loss", -1, "Billhook", "rise of the loss when one block is pruned (`block_loss:SPARSITY`)", "loss", True
    ),
    Metric("loss_share", -1, "Billhook", "part of the KL divergence at 60 % (`loss_share:CRITERION`)", "trial"),
)
CURVES = _by_name(
    Metric("spectrum_quantiles", 1, _WEIGHT_WATCHER, "of the positive eigenvalues of W^T W"),
    Metric("magnitude_quantiles", 1, _HAN, "of |W|", "weight"),
    Metric("lamp_quantiles", 1, _LAMP, "of the roots of the LAMP scores", "weight"),
    Metric("wanda_quantiles", 1, _WANDA, "of |W| x input norm", "activations"),
    Metric("error_curve", -1, "Billhook", "output error at 40 sparsities (`error_curve:CRITERION`)", "loss"),
)
_ALL = FACTS | CURVES


def fact(name: str) -> Metric:
    """The facts of a metric or curve, named with or without a parameter; raises BillhookError for an unknown one."""
    base = name.partition(":")[0]
    if base not in _ALL:
        raise BillhookError(f"Unknown metric {base!r}.{hint(base, _ALL)} There are: {', '.join(_ALL)}.")
    return _ALL[base]


def companions(name: str) -> list[str]:
    """Columns that are measured with a metric: the KS distance of an exponent's fit, and quantiles of the spectrum."""
    base, colon, value = name.partition(":")
    misfit = [f"{base}_ks{colon}{value}"] if f"{base}_ks" in FACTS else []
    return [*misfit, "spectrum_quantiles"] if base in FACTS and FACTS[base].spectral else misfit
