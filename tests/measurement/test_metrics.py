"""Metrics beyond the published exponents: FARMS, the soft rank, the distance to noise, activation metrics, names and
columns."""

import math

import numpy as np
import pytest
import tiny
import torch
from random_weights import gaussian, heavy

from billhook import measure
from billhook.errors import BillhookError
from billhook.measurement import canonical, options_of
from billhook.measurement.activations import outlier_ratio, wanda_mean, wanda_median
from billhook.measurement.eigen import eigenvalues
from billhook.measurement.farms import squares
from billhook.measurement.tails import Spectrum
from billhook.measurement.weights import spectral_metrics
from billhook.plan.metrics import companions, fact

# FARMS


def test_farms_removes_the_bias_of_the_aspect_ratio() -> None:
    """Of noise in four shapes `alpha_mid` is 2.1 to 3.6, `alpha_farms_mid` 2.1."""
    shapes = [(128, 128), (128, 256), (128, 512), (512, 128)]
    found = [spectral_metrics(gaussian(*shape), ["alpha_mid", "alpha_farms_mid"]) for shape in shapes]
    biased, repaired = [x["alpha_mid"] for x in found], [x["alpha_farms_mid"] for x in found]
    assert max(biased) > 1.6 * min(biased)
    assert repaired == pytest.approx([2.1] * 4, rel=0.02)


def test_farms_of_a_square_matrix_is_alpha_peak() -> None:
    values = spectral_metrics(heavy(60, 60), ["alpha_peak", "alpha_farms", "alpha_farms:9"])
    assert values["alpha_farms"] == values["alpha_farms:9"] == pytest.approx(values["alpha_peak"], rel=1e-12)


def test_farms_pools_windows_from_edge_to_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    W = heavy(30, 100)
    parts = list(squares(W, 3))
    assert [part.shape for part in parts] == [(30, 30)] * 3
    assert parts[0].equal(W[:, :30])
    assert parts[1].equal(W[:, 35:65])
    assert parts[2].equal(W[:, 70:])
    pooled = torch.cat([eigenvalues(part) for part in parts]).sort().values
    assert spectral_metrics(W, ["alpha_farms:3"])["alpha_farms:3"] == pytest.approx(
        Spectrum(pooled).fit("peak").alpha, rel=1e-12
    )
    monkeypatch.setattr("billhook.measurement.farms.SIDE", 20)
    assert len(list(squares(W, 3))) == 9
    assert len(list(squares(W[:21], 5))) == 2 * 5
    with pytest.raises(BillhookError, match="at least 1"):
        spectral_metrics(W, ["alpha_farms:0"])


# Soft rank and distance to noise


def test_the_distance_to_noise_is_small_for_noise_and_large_for_structure() -> None:
    noise = spectral_metrics(gaussian(200, 300), ["mp_softrank", "randomized_distance"])
    assert noise["mp_softrank"] == pytest.approx(1, abs=0.08)
    assert noise["randomized_distance"] < 0.35
    spiked = spectral_metrics(gaussian(200, 300) + 1.0, ["mp_softrank"])
    assert spiked["mp_softrank"] < 0.1
    assert (
        spectral_metrics(heavy(200, 300), ["randomized_distance"])["randomized_distance"]
        > noise["randomized_distance"] + 0.2
    )


def test_randomized_distance_is_that_of_histograms_with_100_bins() -> None:
    W = heavy(40, 50)
    W[0] = 0  # one eigenvalue of zero
    shuffled = W.flatten()[torch.randperm(2000, generator=torch.Generator().manual_seed(3))].view(40, 50)
    logs, zeros = [], []
    for weight in (W, shuffled):
        evals = np.linalg.svd(weight.numpy(), compute_uv=False) ** 2
        zeros.append(float((evals < 1e-12).mean()))
        logs.append(np.log10(evals[evals >= 1e-12]))
    span = min(map(min, logs)), max(map(max, logs))
    p, q = (np.append(np.histogram(x, 100, span)[0] / 40, zero) for x, zero in zip(logs, zeros, strict=True))

    def entropy(x: np.ndarray) -> float:
        return -float(sum(v * math.log2(v) for v in x if v > 0))

    expected = math.sqrt(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
    assert zeros[0] == 1 / 40
    name = "randomized_distance:3"
    assert spectral_metrics(W, [name])[name] == pytest.approx(expected, abs=1e-9)


def test_randomized_distance_is_reproducible_and_needs_a_spectrum() -> None:
    W = heavy(40, 50)
    values = spectral_metrics(W, ["randomized_distance", "randomized_distance:0", "randomized_distance:1"])
    assert values["randomized_distance"] == values["randomized_distance:0"] != values["randomized_distance:1"]
    assert spectral_metrics(torch.zeros(4, 4), ["mp_softrank"])["mp_softrank"] == 0
    with pytest.raises(BillhookError, match="all-zero"):
        spectral_metrics(torch.zeros(4, 4), ["randomized_distance"])


# The KS distance beside each exponent


def test_the_table_has_the_distance_of_each_fit() -> None:
    table = measure(tiny.llama(), ["alpha_peak:repaired", "alpha_ks", "stable_rank"])
    assert table.columns() == [
        "alpha_peak:repaired",
        "alpha_peak_ks:repaired",
        "alpha_ks",
        "alpha_ks_ks",
        "stable_rank",
    ]
    W = heavy(50, 80)
    for cut in ("mid", "peak", "ks"):
        fit = Spectrum(eigenvalues(W)).fit(cut)  # type: ignore[arg-type]
        assert spectral_metrics(W, [f"alpha_{cut}_ks"])[f"alpha_{cut}_ks"] == fit.ks_distance


@pytest.mark.parametrize("seed", [0, 1])
def test_alpha_ks_agrees_with_the_powerlaw_package(seed: int) -> None:
    """`powerlaw` uses n - 1 terms less one: our alpha - 1 is n / (n - 1) times its."""
    powerlaw = pytest.importorskip("powerlaw", reason="needs powerlaw")
    evals = eigenvalues(gaussian(150, 200, seed) * torch.arange(1, 151)[:, None] ** -0.7)
    ours = Spectrum(evals).fit("mid")
    theirs = powerlaw.Fit(evals.numpy(), xmin=ours.xmin, verbose=False)
    assert ours.alpha == pytest.approx(theirs.power_law.alpha, rel=1e-4)
    assert ours.ks_distance == pytest.approx(theirs.power_law.D, abs=1.5 / (len(evals) - ours.cut_index))


# Activations


def test_block_scores_by_hand() -> None:
    weights, norms = (
        [gaussian(5, 6).float(), gaussian(7, 4, 1).float(), gaussian(3, 3, 2).float()],
        [torch.rand(6), torch.rand(4), None],
    )
    scores = torch.cat([(w.abs() * n).flatten() for w, n in zip(weights, norms, strict=True) if n is not None])
    assert wanda_mean(weights, norms) == pytest.approx(float(scores.mean()), rel=1e-6)
    assert wanda_median(weights, norms) == float(scores.median())
    assert outlier_ratio(weights, norms, m=2.0) == pytest.approx(
        100 * float((scores > 2 * scores.mean()).double().mean())
    )
    with pytest.raises(BillhookError, match="No layer of a block received"):
        wanda_mean(weights, [None] * 3)
    assert wanda_median([torch.zeros(3, 3)], [torch.ones(3)]) == 0


# Names


def test_columns_are_named_by_metric_and_parameter() -> None:
    assert canonical("outlier_ratio") == canonical("outlier_ratio:5.0") == "outlier_ratio:5"
    assert canonical("block_loss") == "block_loss:0.6"
    assert (canonical("alpha_peak"), canonical("alpha_farms:7")) == ("alpha_peak", "alpha_farms:7")
    assert options_of("alpha_farms:7") == {"windows": 7}
    curve = "spectrum_quantiles"
    assert (companions("alpha_mid"), companions("alpha_mid_ks"), companions("entropy")) == (
        ["alpha_mid_ks", curve],
        [curve],
        [curve],
    )
    assert (companions("alpha_farms"), companions("outlier_ratio"), companions(curve)) == ([], [], [])
    assert [fact(name).needs_text for name in ("alpha_farms", "lamp_quantiles", "wanda_mean", "block_loss:0.5")] == [
        False,
        False,
        True,
        True,
    ]
    for name in ("outlier_ratio:x", "outlier_ratio:nan", "alpha_farms:1.5", "wanda_mean:3"):
        with pytest.raises(BillhookError, match=name.partition(":")[0]):
            canonical(name) if name != "wanda_mean:3" else options_of(name)


@pytest.mark.parametrize("name", ["wanda_mean", "block_loss"])
def test_metrics_that_need_text_say_so(name: str) -> None:
    with pytest.raises(BillhookError, match=rf"The metric {name}.* looks at .*calibration=SOURCE"):
        measure(tiny.llama(), [name])


@pytest.mark.parametrize("name", ["outlier_ratio:0", "outlier_ratio:-1", "block_loss:0", "block_loss:1"])
def test_impossible_parameters_are_named(name: str) -> None:
    with pytest.raises(BillhookError, match=name.partition(":")[0]):
        measure(tiny.llama(), [name], batches=[torch.randint(0, 256, (1, 16))])
