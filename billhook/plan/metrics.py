"""What is known about each metric without computing it: its name, sign, source and place. No torch.

A metric is one number per layer, kept as a column of the table, from which an allocator decides how much to prune.
`sign` says which way: +1 where a larger value means the layer can lose more (more sparsity), -1 where it means the
layer should keep more.

Shape of the spectrum: a heavy tail (small alpha, low entropy, low stable rank) is the mark of a well-trained layer, so
these are +1 (AlphaPruning, arXiv:2410.10912: smaller alpha = less sparsity). Scale: a layer with large norm carries
more, so the norms are -1. The published AlphaPruning code uses +1 for every metric it can be given.

A parameter follows the name after a colon: `outlier_ratio:5`, `alpha_peak:repaired`. What a metric `reads` says how its
function is called: `spectrum` (Spectrum), `weight` (W), `activations` (weights, norms of a block), `loss` and `trial`
(model, layers, batches; for a `trial` the whole model has to be in memory).

A *curve* is a list of numbers per layer instead of one: the quantiles of its scores, from which `global` and `lamp`
find the one threshold that meets the budget, or those of its spectrum, for the pictures of a report. Curves are
measured by name like metrics and kept beside them in the table.
"""

from dataclasses import dataclass
from typing import Any, Literal

from billhook.errors import BillhookError
from billhook.registry import Registry, hint

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


@dataclass(frozen=True)
class Metric:
    """Facts about one metric. `place` is `module:function`; a metric of a whole `block` has one value for all its
    layers."""

    name: str
    sign: Sign
    paper: str
    place: str
    summary: str
    reads: Reads = "spectrum"
    block: bool = False

    @property
    def spectral(self) -> bool:
        """Whether it is computed from the spectrum of the weight."""
        return self.reads == "spectrum"

    @property
    def needs_text(self) -> bool:
        """Whether it looks at what the model does with text."""
        return self.reads in ("activations", "loss", "trial")


def _spectral(name: str, sign: Sign, paper: str, summary: str) -> Metric:
    return Metric(name, sign, paper, f"billhook.measurement.spectra:{name}", summary)


def _farms(name: str, summary: str) -> Metric:
    return Metric(name, 1, _FARMS, f"billhook.measurement.farms:{name}", summary, "weight")


def _activations(name: str, sign: Sign, paper: str, summary: str) -> Metric:
    return Metric(name, sign, paper, f"billhook.measurement.activations:{name}", summary, "activations", block=True)


FACTS: dict[str, Metric] = {
    m.name: m
    for m in (
        _spectral(
            "alpha_peak",
            1,
            _ALPHA_PRUNING,
            "tail exponent, cut at or below the mode of the spectrum, least KS distance",
        ),
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
        _spectral(
            "mp_softrank",
            1,
            _MP,
            "edge of the spectrum of a random matrix of the same size and mean square, over the largest",
        ),
        _spectral(
            "alpha_peak_ks",
            1,
            _ALPHA_PRUNING,
            "KS distance of the fit of alpha_peak: how far the tail is from a power law",
        ),
        _spectral("alpha_mid_ks", 1, _ALPHA_PRUNING, "KS distance of the fit of alpha_mid"),
        _spectral("alpha_ks_ks", 1, _ALPHA_PRUNING, "KS distance of the fit of alpha_ks"),
        _farms("alpha_farms", "alpha_peak of square windows of the weight together: no bias from its shape"),
        _farms("alpha_farms_mid", "alpha_mid of square windows of the weight together: no bias from its shape"),
        Metric(
            "randomized_distance",
            -1,
            _WEIGHT_WATCHER,
            "billhook.measurement.randomized:randomized_distance",
            "Jensen-Shannon distance of the spectrum to that of the same weights shuffled",
            "weight",
        ),
        _activations(
            "outlier_ratio",
            -1,
            _OWL,
            "per cent of a block's |W| x input norm above M times their mean (`outlier_ratio:M`)",
        ),
        _activations("wanda_mean", 1, _DLP, "mean of a block's |W| x input norm"),
        _activations("wanda_median", 1, _DLP, "median of a block's |W| x input norm"),
        Metric(
            "block_loss",
            -1,
            "Billhook",
            "billhook.measurement.block_loss:block_loss",
            "relative rise of the loss when only this block is pruned by magnitude (`block_loss:SPARSITY`)",
            "loss",
            block=True,
        ),
        Metric(
            "loss_share",
            -1,
            "Billhook",
            "billhook.measurement.loss_shares:loss_share",
            "divergence from the dense model, in nats a token, due to this layer when all lose 60 % "
            "(`loss_share:CRITERION`)",
            "trial",
        ),
    )
}
CURVES: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "spectrum_quantiles",
            1,
            _WEIGHT_WATCHER,
            "billhook.measurement.spectra:spectrum_quantiles",
            "of the positive eigenvalues of W^T W",
        ),
        Metric(
            "magnitude_quantiles",
            1,
            "Han et al. 2015, arXiv:1506.02626",
            "billhook.measurement.quantiles:magnitude_quantiles",
            "of |W|",
            "weight",
        ),
        Metric(
            "lamp_quantiles",
            1,
            _LAMP,
            "billhook.measurement.quantiles:lamp_quantiles",
            "of the roots of the LAMP scores",
            "weight",
        ),
        Metric(
            "wanda_quantiles",
            1,
            "Sun et al. 2023, arXiv:2306.11695",
            "billhook.measurement.quantiles:wanda_quantiles",
            "of |W| x input norm",
            "activations",
        ),
        Metric(
            "error_curve",
            -1,
            "Billhook",
            "billhook.measurement.error_curves:error_curve",
            "relative squared error of the layer's output, at 40 sparsities (`error_curve:CRITERION`)",
            "loss",
        ),
    )
}
METRICS = Registry("metric", {m.name: m.place for m in FACTS.values()})
SIGNS: dict[str, Sign] = {m.name: m.sign for m in FACTS.values()}
_ALL = FACTS | CURVES
_PLACES = Registry("metric", {m.name: m.place for m in _ALL.values()})


def fact(name: str) -> Metric:
    """The facts of a metric or curve, with or without a parameter after a colon; raises BillhookError with the nearest
    name."""
    base = name.partition(":")[0]
    if base not in _ALL:
        raise BillhookError(f"Unknown metric {base!r}.{hint(base, _ALL)} There are: {', '.join(_ALL)}.")
    return _ALL[base]


def function_of(name: str) -> Any:
    """The function that computes a metric or curve (imports what it needs)."""
    return _PLACES.get(fact(name).name)


def options_of(name: str) -> dict[str, Any]:
    """The parameter after the colon as the metric's one option; raises BillhookError for one that it cannot take."""
    base, colon, value = name.partition(":")
    if not colon:
        return {}
    options = list(_PLACES.options(fact(name).name))
    if not options:
        raise BillhookError(f"Metric {base!r} takes no parameter, got {name!r}.")
    return _PLACES.configure(base, {options[0]: value})


def canonical(name: str) -> str:
    """The name of the column: a number after the colon in its shortest form, and the default number where none was
    given."""
    base = fact(name).name
    for key, option in _PLACES.options(base).items():
        value = options_of(name).get(key, option.default)
        if isinstance(value, float):
            return f"{base}:{value:g}"
    return name


def companions(name: str) -> list[str]:
    """Columns that are measured beside a metric: the KS distance of an exponent's fit, and the spectrum that it was
    read off."""
    base, colon, value = name.partition(":")
    misfit = [f"{base}_ks{colon}{value}"] if f"{base}_ks" in FACTS else []
    return [*misfit, "spectrum_quantiles"] if base in FACTS and FACTS[base].spectral else misfit


def sign(name: str) -> Sign:
    """+1 where a larger value of this metric (column) asks for more sparsity, -1 where it asks for less."""
    return fact(name).sign
