"""What every structured method promises."""

import pytest
import torch
from torch import Tensor

from billhook.methods.statistics import LayerStats
from billhook.methods.structured import STRUCTURED

CHANNELS = torch.arange(24)[:, None]
HEADS = torch.arange(24).view(6, 4)


def layer(seed: int = 0) -> tuple[Tensor, LayerStats, Tensor]:
    """A consumer [8, 24], statistics of correlated inputs, and the inputs [200, 24]."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(200, 24, generator=g) @ torch.randn(24, 24, generator=g)
    W = torch.randn(8, 24, generator=g)
    gradient = torch.rand(8, 24, generator=g)
    gram = X.T @ X
    return W, LayerStats(200, 1, gram.diagonal().sqrt(), gram, gradient=gradient), X


def error(W: Tensor, V: Tensor, X: Tensor) -> float:
    return float((X @ (W - V).T).square().sum())


@pytest.mark.parametrize("count", [0, 1, 4, 6])
@pytest.mark.parametrize("groups", [CHANNELS, HEADS], ids=["channels", "heads"])
@pytest.mark.parametrize("method", STRUCTURED.names())
def test_count_parts_are_kept_and_the_others_columns_are_zero(method, groups, count):
    W, stats, _ = layer()
    before = W.clone()
    keep, V = STRUCTURED.get(method)(W, stats, groups, count)
    assert keep.dtype == torch.bool
    assert keep.shape == (len(groups),)
    assert int(keep.sum()) == count
    for part, columns in enumerate(groups):
        assert bool(V[:, columns].any()) == bool(keep[part])
    assert V.dtype == torch.float32
    assert torch.equal(W, before)


@pytest.mark.parametrize("method", STRUCTURED.names())
def test_nothing_changes_where_every_part_is_kept(method):
    W, stats, _ = layer()
    keep, V = STRUCTURED.get(method)(W, stats, CHANNELS, 24)
    assert keep.all()
    torch.testing.assert_close(V, W, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", STRUCTURED.names())
def test_a_part_that_contributes_nothing_goes_first(method):
    W, stats, _ = layer()
    W[:, HEADS[2]] = 0
    keep, _ = STRUCTURED.get(method)(W, stats, HEADS, 5)
    assert keep.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("groups", [CHANNELS, HEADS], ids=["channels", "heads"])
def test_obs_loses_less_than_wanda_with_least_squares_which_loses_less_than_wanda(groups):
    losses = torch.zeros(3)
    for seed in range(5):
        W, stats, X = layer(seed)
        kept = 3 * len(groups) // 4
        plain = STRUCTURED.get("wanda_sp")(W, stats, groups, kept)[1]
        fitted = STRUCTURED.get("wanda_sp")(W, stats, groups, kept, least_squares=True)[1]
        best = STRUCTURED.get("obs")(W, stats, groups, kept, shrinkage=0.0)[1]  # the loss is that of the same text
        losses += torch.tensor([error(W, V, X) for V in (best, fitted, plain)])
    assert losses[0] < 0.9 * losses[1] < 0.9 * losses[2]
