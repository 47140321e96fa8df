"""What is known about each metric without computing it: name, sign, source, and what it reads. No torch.

A metric is one number per layer, kept as a column of the table, from which an allocator decides how much to prune.
`sign` is +1 where a larger value means that the layer can lose more (more sparsity), -1 where it should keep more.

Shape of the spectrum: a heavy tail (small alpha, low entropy, low stable rank) marks a well-trained layer, so these are
+1 (AlphaPruning, arXiv:2410.10912: smaller alpha = less sparsity). Scale: a layer with a large norm matters more, so
the norms are -1. The published AlphaPruning code uses +1 for every metric it can be given.

A parameter follows the name after a colon: `outlier_ratio:5`, `alpha_peak:repaired`. `reads` says which arguments the
metric's function gets: `spectrum` (Spectrum), `weight` (W), `activations` (weights and input norms of a block), `loss`
and `trial` (model, layers, batches; for a `trial` the whole model has to be in memory). The functions themselves are in
`billhook.measurement`.

A *curve* is a list of numbers per layer: the quantiles of its scores, from which `global` and `lamp` find the one
threshold that meets the budget, or those of its spectrum, which reports draw. Curves are measured by name like metrics
and kept beside them in the table.
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
        """Whether it depends on what the model does with text."""
        return self.reads in ("activations", "loss", "trial")


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


FACTS = _by_name(
    Metric(
        "alpha_peak", 1, _ALPHA_PRUNING, "tail exponent, cut at or below the mode of the spectrum, least KS distance"
    ),
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
        "mp_softrank",
        1,
        _MP,
        "edge of the spectrum of a random matrix of the same size and mean square, over the largest",
    ),
    Metric(
        "alpha_peak_ks", 1, _ALPHA_PRUNING, "KS distance of the fit of alpha_peak: how far the tail is from a power law"
    ),
    Metric("alpha_mid_ks", 1, _ALPHA_PRUNING, "KS distance of the fit of alpha_mid"),
    Metric("alpha_ks_ks", 1, _ALPHA_PRUNING, "KS distance of the fit of alpha_ks"),
    Metric(
        "alpha_farms",
        1,
        _FARMS,
        "alpha_peak of square windows of the weight together: no bias from its shape",
        "weight",
    ),
    Metric(
        "alpha_farms_mid",
        1,
        _FARMS,
        "alpha_mid of square windows of the weight together: no bias from its shape",
        "weight",
    ),
    Metric(
        "randomized_distance",
        -1,
        _WEIGHT_WATCHER,
        "Jensen-Shannon distance of the spectrum to that of the same weights shuffled",
        "weight",
    ),
    Metric(
        "outlier_ratio",
        -1,
        _OWL,
        "per cent of a block's |W| x input norm above M times their mean (`outlier_ratio:M`)",
        "activations",
        block=True,
    ),
    Metric("wanda_mean", 1, _DLP, "mean of a block's |W| x input norm", "activations", block=True),
    Metric("wanda_median", 1, _DLP, "median of a block's |W| x input norm", "activations", block=True),
    Metric(
        "block_loss",
        -1,
        "Billhook",
        "relative rise of the loss when only this block is pruned by magnitude (`block_loss:SPARSITY`)",
        "loss",
        block=True,
    ),
    Metric(
        "loss_share",
        -1,
        "Billhook",
        "divergence from the dense model, in nats a token, due to this layer when all lose 60 % "
        "(`loss_share:CRITERION`)",
        "trial",
    ),
)
CURVES = _by_name(
    Metric("spectrum_quantiles", 1, _WEIGHT_WATCHER, "of the positive eigenvalues of W^T W"),
    Metric("magnitude_quantiles", 1, _HAN, "of |W|", "weight"),
    Metric("lamp_quantiles", 1, _LAMP, "of the roots of the LAMP scores", "weight"),
    Metric("wanda_quantiles", 1, _WANDA, "of |W| x input norm", "activations"),
    Metric(
        "error_curve",
        -1,
        "Billhook",
        "relative squared error of the layer's output, at 40 sparsities (`error_curve:CRITERION`)",
        "loss",
    ),
)
SIGNS: dict[str, Sign] = {m.name: m.sign for m in FACTS.values()}
_ALL = FACTS | CURVES


def fact(name: str) -> Metric:
    """The facts of a metric or curve, with or without a parameter after a colon; raises BillhookError with the nearest
    name."""
    base = name.partition(":")[0]
    if base not in _ALL:
        raise BillhookError(f"Unknown metric {base!r}.{hint(base, _ALL)} There are: {', '.join(_ALL)}.")
    return _ALL[base]


def companions(name: str) -> list[str]:
    """Columns that are measured beside a metric: the KS distance of an exponent's fit, and the quantiles of the
    spectrum that a metric was computed from."""
    base, colon, value = name.partition(":")
    misfit = [f"{base}_ks{colon}{value}"] if f"{base}_ks" in FACTS else []
    return [*misfit, "spectrum_quantiles"] if base in FACTS and FACTS[base].spectral else misfit


def sign(name: str) -> Sign:
    """+1 where a larger value of this metric (column) asks for more sparsity, -1 where it asks for less."""
    return fact(name).sign
