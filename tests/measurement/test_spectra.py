"""Spectral metrics: closed forms, published results on trained models, invariances, degenerate weights."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import gaussian, heavy
from safetensors.torch import load_file
from torch import Tensor

from billhook.errors import BillhookError
from billhook.measurement import METRICS
from billhook.measurement.eigen import eigenvalues
from billhook.measurement.tails import Spectrum
from billhook.measurement.weights import measure_spectra, spectral_metrics
from billhook.plan.metrics import CURVES, FACTS, fact

SPECTRAL = [name for name, known in FACTS.items() if known.spectral]


ALPHAS = ["alpha_mid", "alpha_peak", "alpha_ks"]


seeds = st.integers(0, 10_000)


def test_metrics_of_a_known_matrix_are_exact() -> None:
    i, j = torch.arange(64, dtype=torch.float64)[:, None], torch.arange(96, dtype=torch.float64)
    W = torch.sin(0.37 * i + 0.11 * i * j) + 0.05 * torch.cos(i * j)
    values = spectral_metrics(W, SPECTRAL)
    assert values["alpha_mid"] == pytest.approx(7.67345, abs=1e-5)
    assert values["alpha_peak"] == values["alpha_ks"] == pytest.approx(7.66247, abs=1e-5)
    assert Spectrum(eigenvalues(W)).fit("ks").cut_index == 25
    assert values["frobenius_sq"] == pytest.approx(3075.4157, abs=1e-4)
    assert values["spectral_norm"] == pytest.approx(99.44276, abs=1e-5)
    assert values["stable_rank"] == pytest.approx(30.92649, abs=1e-5)
    assert values["entropy"] == pytest.approx(0.970418, abs=1e-6)
    assert values["alpha_hat"] == pytest.approx(7.66247 * math.log10(99.44276), rel=1e-5)
    assert values["log_norm"] == pytest.approx(math.log10(3075.4157), rel=1e-7)
    assert values["log_spectral_norm"] == pytest.approx(math.log10(99.44276), rel=1e-7)
    assert values["log_alpha_norm"] == pytest.approx(
        math.log10(float((eigenvalues(W) ** values["alpha_ks"]).sum())), rel=1e-9
    )


def test_alpha_of_noise_depends_on_the_aspect_ratio() -> None:
    assert spectral_metrics(gaussian(512, 512), ["alpha_mid"])["alpha_mid"] == pytest.approx(2.13, abs=0.03)
    assert spectral_metrics(gaussian(512, 1376), ["alpha_mid"])["alpha_mid"] == pytest.approx(2.99, abs=0.03)


@pytest.mark.parametrize("model", ["stories260k", "babyllama-105", "c4gut-llama-8x128", "c4gut-llama-12x128"])
def test_spectral_metrics_agree_with_published_results(shared: Path, model: str) -> None:
    """Alphas to 1e-5 relative; KS distances, differences of numbers near one in the reference's float32, to 1e-5
    absolute."""
    expected = json.loads((shared / "golden" / model / "reference.json").read_text())["spectra"]
    weights = load_file(shared / "models" / model / "model.safetensors")
    for layer in expected["alpha_mid"]:
        spectrum = Spectrum(eigenvalues(weights[f"{layer}.weight"]))
        for cut in ("mid", "peak", "ks"):
            fit = spectrum.fit(cut)
            assert fit.alpha == pytest.approx(expected[f"alpha_{cut}"][layer], rel=1e-5), (layer, cut)
            assert fit.ks_distance == pytest.approx(expected[f"alpha_{cut}_D"][layer], abs=1e-5), (layer, cut)
        for name in ("spectral_norm", "frobenius_sq"):
            assert METRICS.get(name)(spectrum) == pytest.approx(expected[name][layer], rel=2e-6), (layer, name)


@pytest.mark.gate
def test_exponents_of_gpt2_agree_with_published_results(shared: Path) -> None:
    weights = load_file(shared / "models" / "gpt2-small-attn-c_proj.safetensors")
    alphas = [
        spectral_metrics(weights[f"h.{block}.attn.c_proj.weight"], ["alpha_mid"])["alpha_mid"] for block in range(12)
    ]
    assert min(alphas) == alphas[0] == pytest.approx(1.33, abs=0.005)
    assert max(alphas) == alphas[10] == pytest.approx(2.22, abs=0.01)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(8, 50), st.integers(8, 50), st.floats(-6, 6))
def test_alpha_ignores_transposition_scale_and_rotation(seed: int, rows: int, columns: int, decades: float) -> None:
    names = ["alpha_mid", "alpha_ks", "alpha_peak:repaired", "entropy", "stable_rank"]
    W = heavy(rows, columns, seed)
    expected = spectral_metrics(W, names)
    assert spectral_metrics(W.T, [*names, "alpha_peak"]) == pytest.approx(
        spectral_metrics(W, [*names, "alpha_peak"]), rel=1e-6
    )
    assert spectral_metrics(W * 10**decades, names) == pytest.approx(expected, rel=1e-6)
    rotation = torch.linalg.qr(gaussian(rows, rows, seed + 1)).Q
    assert spectral_metrics(rotation @ W, names) == pytest.approx(expected, rel=1e-6)


WITHOUT_EXPONENT = [
    torch.zeros(6, 9),
    torch.ones(1, 9),
    torch.ones(9, 1),
    torch.ones(1, 1),
    torch.ones(6, 9),
    torch.eye(7) * 3,
    gaussian(2, 9),
]


@pytest.mark.parametrize("W", WITHOUT_EXPONENT)
def test_weights_without_an_exponent_give_an_error_that_names_it(W: Tensor) -> None:
    """Scale and shape metrics are finite; an exponent that does not exist is a named error, never NaN, inf or the
    published 0."""
    values = spectral_metrics(W, ["entropy", "stable_rank", "spectral_norm", "frobenius_sq"])
    assert all(math.isfinite(v) for v in values.values())
    for name in ALPHAS:
        with pytest.raises(BillhookError, match="exponent"):
            spectral_metrics(W, [name])


def test_all_zero_has_no_logarithm() -> None:
    values = spectral_metrics(torch.zeros(3, 3), ["stable_rank", "entropy", "frobenius_sq"])
    assert set(values.values()) == {0.0}
    for name in ("log_norm", "log_spectral_norm"):
        with pytest.raises(BillhookError, match="all-zero"):
            spectral_metrics(torch.zeros(3, 3), [name])


def test_entropy_is_relative_to_the_rank() -> None:
    for values, expected in (([2.0, 2.0, 0.0, 0.0], 1.0), ([1.0, math.sqrt(3.0), 0.0], 0.811278)):
        W = torch.tensor(values, dtype=torch.float64).diag()
        assert spectral_metrics(W, ["entropy"])["entropy"] == pytest.approx(expected, abs=1e-6)


def test_rank_deficient_equals_its_own_full_rank_part() -> None:
    """Removed rows, removed columns and dependent rows leave exact zeros, and zeros take no part in a fit."""
    W = heavy(30, 50)
    padded = torch.zeros(40, 64, dtype=torch.float64)
    padded[5:35, 7:57] = W
    empty_row = torch.cat([W, W.new_zeros(1, 50)])
    same_row = torch.cat([W[:-1], W[-1:] * 0.6, W[-1:] * 0.8])
    for deficient, zeros in ((padded, 10), (empty_row, 1), (same_row, 1)):
        evals = eigenvalues(deficient)
        assert int((evals == 0).sum()) == zeros
        for cut in ("mid", "peak", "ks"):
            ours, full = Spectrum(evals).fit(cut), Spectrum(eigenvalues(W)).fit(cut)  # type: ignore[arg-type]
            assert ours.alpha == pytest.approx(full.alpha, rel=1e-6)
            assert ours.cut_index == full.cut_index + zeros


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(3, 30), st.integers(3, 30), st.floats(0, 0.9))
def test_pruned_weights_give_finite_values_or_a_named_error(
    seed: int, rows: int, columns: int, sparsity: float
) -> None:
    W = heavy(rows, columns, seed)
    W = torch.where(torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) < sparsity, 0, W)
    for name in SPECTRAL:
        with suppress(BillhookError):
            assert math.isfinite(spectral_metrics(W, [name])[name])


def test_facts_and_functions_agree() -> None:
    assert METRICS.names() == [*FACTS, *CURVES]
    for name in SPECTRAL:
        assert METRICS.paper(name) == FACTS[name].paper
        assert METRICS.get(name).__doc__
    assert (fact("alpha_peak").sign, fact("outlier_ratio:5").sign) == (1, -1)
    assert fact("alpha_peak:repaired").name == "alpha_peak"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpha_peek", "Did you mean 'alpha_peak'"),
        ("outlier_ratio", "calibration"),
        ("entropy:3", "no parameter"),
        ("alpha_peak:mended", "repaired"),
    ],
)
def test_unknown_metrics_are_refused(name: str, message: str) -> None:
    with pytest.raises(BillhookError, match=message):
        spectral_metrics(gaussian(4, 4), [name])


@dataclass(frozen=True)
class Sample:
    name: str
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])


def test_many_layers_equal_one_by_one() -> None:
    layers = [Sample(f"layer {n}", heavy(20 + n, 30, n)) for n in range(5)]
    threads, seen = torch.get_num_threads(), []
    values = measure_spectra(layers, SPECTRAL, seen.append)
    assert seen == list(values) == [layer.name for layer in layers]
    assert torch.get_num_threads() == threads
    for layer in layers:
        assert values[layer.name] == pytest.approx(spectral_metrics(layer.weight, SPECTRAL), rel=1e-10)
    assert measure_spectra([], SPECTRAL) == {}


def test_an_error_names_its_layer() -> None:
    layers = [Sample("good", heavy(9, 9)), Sample("bad", torch.full((9, 9), math.nan))]
    threads = torch.get_num_threads()
    with pytest.raises(BillhookError, match=r"^bad: The weight holds NaN"):
        measure_spectra(layers, ["alpha_mid"])
    assert torch.get_num_threads() == threads
