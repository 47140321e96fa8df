"""Tail fits against closed forms and against the published procedure written as plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import gaussian, heavy
from torch import Tensor

from billhook.measurement.eigen import eigenvalues
from billhook.measurement.tails import Spectrum, hill, ks_distances
from billhook.measurement.weights import spectral_metrics


def low_rank_plus_noise(size: int, rank: int, seed: int = 0) -> Tensor:
    return gaussian(size, rank, seed) @ gaussian(rank, size, seed + 1) + 0.1 * gaussian(size, size, seed + 2)


def pareto(a: float, count: int = 1000) -> Tensor:
    """Exact quantiles of a density falling as l^-a."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (1 - u) ** (-1 / (a - 1))


def oracle(evals: Tensor, cut: str, log_bound: str = "published") -> tuple[float, float, int]:
    """The published procedure, cut by cut and term by term."""
    values = evals.tolist()
    count = len(values)
    lowest, highest = 0.0, math.inf
    if cut == "peak":
        decades = [math.log10(v) for v in values]
        width = (decades[-1] - decades[0]) / 100
        bins = [0] * 100
        for d in decades:
            bins[min(int((d - decades[0]) / width), 99)] += 1
        mode = 10 ** (decades[0] + bins.index(max(bins)) * width)
        lowest, highest = (math.log10(0.95 * mode) if log_bound == "published" else 0.95 * mode), 1.5 * mode
    best = (0.0, 1.0, 0)
    for i in [count // 2] if cut == "mid" else range(count - 1):
        if not lowest <= values[i] <= highest:
            continue
        n = count - i
        alpha = 1 + n / (sum(math.log(v) for v in values[i:]) - n * math.log(values[i]))
        distance = max(abs(1 - (values[j] / values[i]) ** (1 - alpha) - (j - i) / n) for j in range(i, count))
        if distance < best[1]:
            best = (alpha, distance, i)
    return best


def test_exponents_of_a_geometric_spectrum_are_exact() -> None:
    evals = 2.0 ** torch.arange(8, dtype=torch.float64)
    assert Spectrum(evals).fit("mid").cut_index == 4
    assert Spectrum(evals).fit("mid").alpha == pytest.approx(1.96180, abs=5e-6)
    assert Spectrum(evals).fit("peak") == Spectrum(evals).fit("ks")
    assert Spectrum(evals).fit("ks").alpha == pytest.approx(1.41220, abs=5e-6)


@pytest.mark.parametrize(
    ("a", "mid", "peak"), [(2, 2.001697, 2.000847), (3, 3.003393, 3.001695), (4, 4.005089, 4.002542)]
)
def test_exponents_of_pareto_quantiles_are_exact(a: float, mid: float, peak: float) -> None:
    assert Spectrum(pareto(a)).fit("mid").alpha == pytest.approx(mid, abs=1e-6)
    assert Spectrum(pareto(a)).fit("peak").alpha == pytest.approx(peak, abs=1e-6)


def test_the_repaired_bound_changes_low_rank_plus_noise_alone() -> None:
    """Nothing changes on noise; on low rank plus noise the published bound lets far lower cuts in."""
    for W in (gaussian(200, 200), torch.distributions.StudentT(2.5).sample((200, 300))):
        values = spectral_metrics(W, ["alpha_peak", "alpha_peak:repaired"])
        assert values["alpha_peak"] == values["alpha_peak:repaired"]
    evals = eigenvalues(low_rank_plus_noise(200, 20))
    published, repaired = Spectrum(evals).fit("peak"), Spectrum(evals).fit("peak", "repaired")
    assert published.alpha == pytest.approx(oracle(evals, "peak")[0], rel=1e-9)
    assert repaired.alpha == pytest.approx(oracle(evals, "peak", "repaired")[0], rel=1e-9)
    assert published.alpha < repaired.alpha - 0.05


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(5, 80),
    st.integers(5, 80),
    st.sampled_from([gaussian, heavy]),
    st.sampled_from(["mid", "peak", "ks"]),
)
def test_fits_equal_the_plain_loops(seed: int, rows: int, columns: int, kind: object, cut: str) -> None:
    evals = eigenvalues(kind(rows, columns, seed), "svd")  # type: ignore[operator]
    fit = Spectrum(evals).fit(cut)  # type: ignore[arg-type]
    alpha, distance, index = oracle(evals, cut)
    assert fit.cut_index == index
    assert fit.alpha == pytest.approx(alpha, rel=1e-10)
    assert fit.ks_distance == pytest.approx(distance, rel=1e-9)
    assert fit.xmin == float(evals[index])


def test_every_cut_equals_the_plain_loops_across_blocks_of_cuts() -> None:
    logs = eigenvalues(heavy(300, 400)).log()
    alphas = hill(logs)
    distances = ks_distances(logs, alphas)
    values = logs.exp()
    for i in range(len(logs) - 1):
        tail, n = values[i:], len(logs) - i
        assert float(alphas[i]) == pytest.approx(float(1 + n / (tail.log() - tail[0].log()).sum()), rel=1e-10)
        steps = torch.arange(n, dtype=torch.float64) / n
        assert float(distances[i]) == pytest.approx(
            float((1 - (tail / tail[0]) ** (1 - alphas[i]) - steps).abs().max()), rel=1e-9
        )


def test_heavier_tail_has_smaller_alpha() -> None:
    alphas = [Spectrum(pareto(a)).fit("peak").alpha for a in (1.5, 2, 3, 5)]
    assert alphas == sorted(alphas)
