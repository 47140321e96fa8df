"""What is known about each metric without computing it: its name, sign, source and place. No torch.

A metric is one number per layer, kept as a column of the table, from which an allocator decides how much to prune. `sign` says
which way: +1 where a larger value means the layer can lose more (more sparsity), -1 where it means the layer should keep more.

Shape of the spectrum: a heavy tail (small alpha, low entropy, low stable rank) is the mark of a well-trained layer, so these are +1
(AlphaPruning, arXiv 2410.10912; METHODS: smaller alpha = less sparsity). Scale: a layer with large norm carries more, so the norms
are -1. The published AlphaPruning code uses +1 for every metric it can be given.

A parameter follows the name after a colon: `outlier_ratio:5`, `alpha_peak:repaired`.
"""

from dataclasses import dataclass
from typing import Literal

from billhook.errors import BillhookError
from billhook.registry import Registry, hint

Sign = Literal[1, -1]

_ALPHA_PRUNING = "AlphaPruning, Lu et al. 2024, arXiv 2410.10912"
_WEIGHT_WATCHER = "Martin, Peng & Mahoney 2021, Nature Communications 12:4122 (WeightWatcher)"
_STABLE_RANK = "Rudelson & Vershynin 2007, J. ACM 54(4):21"
_OWL = "OWL, Yin et al. 2024, arXiv 2310.05175"


@dataclass(frozen=True)
class Metric:
    """Facts about one metric. `place` is `module:function`; `spectral` means it is computed from the spectrum of the weight alone."""

    name: str
    sign: Sign
    paper: str
    place: str
    summary: str
    spectral: bool = True


def _spectral(name: str, sign: Sign, paper: str, summary: str) -> Metric:
    return Metric(name, sign, paper, f"billhook.spectra:{name}", summary)


FACTS: dict[str, Metric] = {
    m.name: m
    for m in (
        _spectral("alpha_peak", 1, _ALPHA_PRUNING, "tail exponent, cut at or below the mode of the spectrum, least KS distance"),
        _spectral("alpha_mid", 1, _ALPHA_PRUNING, "tail exponent of the upper half of the spectrum"),
        _spectral("alpha_ks", 1, _ALPHA_PRUNING, "tail exponent, least KS distance over all cuts"),
        _spectral("entropy", 1, _WEIGHT_WATCHER, "entropy of the spectrum over ln(rank): 1 is flat, 0 is rank one"),
        _spectral("stable_rank", 1, _STABLE_RANK, "sum of the eigenvalues over the largest"),
        _spectral("alpha_hat", 1, _WEIGHT_WATCHER, "alpha_ks x log10 of the largest eigenvalue"),
        _spectral("log_alpha_norm", 1, _WEIGHT_WATCHER, "log10 of the sum of eigenvalues ^ alpha_ks"),
        _spectral("spectral_norm", -1, _WEIGHT_WATCHER, "largest eigenvalue of W^T W"),
        _spectral("log_spectral_norm", -1, _WEIGHT_WATCHER, "log10 of the largest eigenvalue of W^T W"),
        _spectral("frobenius_sq", -1, _WEIGHT_WATCHER, "sum of squared weights"),
        _spectral("log_norm", -1, _WEIGHT_WATCHER, "log10 of the sum of squared weights"),
        Metric(
            "outlier_ratio",
            -1,
            _OWL,
            "billhook.outliers:outlier_ratio",
            "per cent of a block's |W| x input norm above M times their mean (`outlier_ratio:M`)",
            spectral=False,
        ),
    )
}
METRICS = Registry("metric", {m.name: m.place for m in FACTS.values()})
SIGNS: dict[str, Sign] = {m.name: m.sign for m in FACTS.values()}


def fact(name: str) -> Metric:
    """The facts of a metric, with or without a parameter after a colon; raises BillhookError with the nearest name."""
    base = name.partition(":")[0]
    if base not in FACTS:
        raise BillhookError(f"Unknown metric {base!r}.{hint(base, FACTS)} There are: {', '.join(FACTS)}.")
    return FACTS[base]


def sign(name: str) -> Sign:
    """+1 where a larger value of this metric (column) asks for more sparsity, -1 where it asks for less."""
    return fact(name).sign
