"""WeightWatcher as an oracle for every metric that it has too; skipped where it is not installed."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from billhook.measurement.eigen import eigenvalues
from billhook.measurement.weights import spectral_metrics

pytestmark = pytest.mark.nightly

SAME = {
    "alpha_ks": "alpha",
    "alpha_ks_ks": "D",
    "entropy": "entropy",
    "stable_rank": "stable_rank",
    "spectral_norm": "spectral_norm",
    "log_spectral_norm": "log_spectral_norm",
    "frobenius_sq": "norm",
    "log_norm": "log_norm",
    "alpha_hat": "alpha_weighted",
    "log_alpha_norm": "log_alpha_norm",
}
SHAPES = [(64, 64), (100, 60), (60, 150), (200, 120)]


@pytest.fixture
def weightwatcher() -> Any:
    return pytest.importorskip("weightwatcher", reason="needs weightwatcher: pip install weightwatcher")


def heavy(rows: int, columns: int, strength: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    left, right = torch.arange(1, rows + 1)[:, None] / rows, torch.arange(1, columns + 1) / columns
    return torch.randn(rows, columns, generator=generator) * left**-strength * right ** (-strength / 2) * 0.02


def analyzed(weightwatcher: Any, weights: list[Tensor]) -> list[dict[str, float]]:
    """WeightWatcher's own analysis of a model made of these weights."""
    model = nn.Sequential(*(nn.Linear(W.shape[1], W.shape[0], bias=False) for W in weights))
    for layer, W in zip(model, weights, strict=True):
        layer.weight.data = W
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    np.random.seed(0)  # its shuffles
    found = weightwatcher.WeightWatcher(model=model).analyze(mp_fit=True, randomize=True, plot=False, min_evals=1)
    return found.to_dict("records")


def test_metrics_agree_with_weightwatcher(weightwatcher: Any) -> None:
    weights = [heavy(*shape) for shape in SHAPES]
    for W, theirs in zip(weights, analyzed(weightwatcher, weights), strict=True):
        ours = spectral_metrics(W, list(SAME))
        assert {SAME[name]: value for name, value in ours.items()} == pytest.approx(
            {key: theirs[key] for key in SAME.values()}, rel=1e-5
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_rank_is_weightwatchers_at_the_variance_of_all_weights(weightwatcher: Any, shape: tuple[int, int]) -> None:
    """The formula is the same; WeightWatcher's analysis puts in a variance fitted to the bulk."""
    W = heavy(*shape)
    columns, rows = sorted(W.shape)
    evals = eigenvalues(W).numpy() / rows
    theirs = weightwatcher.RMT_Util.calc_mp_soft_rank(evals, rows / columns, float(W.square().mean().sqrt()))
    assert spectral_metrics(W, ["mp_softrank"])["mp_softrank"] == pytest.approx(float(theirs), rel=1e-5)


def test_soft_rank_and_distance_to_noise_put_matrices_in_the_same_order(weightwatcher: Any) -> None:
    weights = [heavy(64, 64, strength) for strength in (0.3, 0.6, 0.9)]
    ours = [spectral_metrics(W, ["mp_softrank", "randomized_distance"]) for W in weights]
    theirs = analyzed(weightwatcher, weights)
    for name, key in (("mp_softrank", "mp_softrank"), ("randomized_distance", "rand_distance")):
        order = sorted(range(len(weights)), key=lambda i: theirs[i][key])
        assert order == sorted(range(len(weights)), key=lambda i: ours[i][name]), name
