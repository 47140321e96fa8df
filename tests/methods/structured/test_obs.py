"""obs against a plain loop that solves the whole least-squares problem for every possible removal."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.statistics import LayerStats
from billhook.methods.structured.obs import obs
from billhook.methods.structured.support import columns, damped

PLAIN = {"dense_target": 0.0, "damping": 1e-3, "shrinkage": 0.0}


def case(seed: int, parts: int, size: int) -> tuple[Tensor, LayerStats, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = parts * size
    X = torch.randn(100, n, generator=g) @ torch.randn(n, n, generator=g)
    return torch.randn(5, n, generator=g), LayerStats(100, 1, gram=X.T @ X), torch.arange(n).view(parts, size)


def best(W: Tensor, H: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """Row by row, the weights on the columns `kept` with the least loss, and that loss."""
    V, loss = torch.zeros_like(W, dtype=torch.float64), 0.0
    index = kept.nonzero()[:, 0]
    for row, w in enumerate(W.double()):
        if len(index):
            V[row, index] = torch.linalg.solve(H[index][:, index], (H @ w)[index])
        d = w - V[row]
        loss += float(d @ H @ d)
    return V, loss


def greedy(W: Tensor, H: Tensor, groups: Tensor, count: int) -> list[int]:
    """Remove, one at a time, the part without which the least-squares loss is smallest."""
    there = list(range(len(groups)))
    while len(there) > count:

        def loss(part: int) -> float:
            left = [p for p in there if p != part]
            keep = torch.tensor([p in left for p in range(len(groups))])
            return best(W, H, columns(keep, groups, W.shape[1]))[1]

        there.remove(min(there, key=loss))
    return there


@pytest.mark.parametrize(("parts", "size"), [(10, 1), (5, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_without_swaps_it_is_the_greedy_loop(seed, parts, size):
    W, stats, groups = case(seed, parts, size)
    H = damped(stats.gram, PLAIN["damping"])
    count = parts - 4 if size == 1 else parts - 2
    keep, V = obs(W, stats, groups, count, swaps=0, **PLAIN)
    assert keep.nonzero()[:, 0].tolist() == greedy(W, H, groups, count)
    expected, _ = best(W, H, columns(keep, groups, W.shape[1]))
    torch.testing.assert_close(V.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_swaps_never_lose_and_end_where_no_single_exchange_gains(seed):
    W, stats, groups = case(seed, 10, 1)
    H = damped(stats.gram, PLAIN["damping"])
    first, _ = obs(W, stats, groups, 5, swaps=0, rounds=1, **PLAIN)  # a poor start: all at once
    keep, _ = obs(W, stats, groups, 5, swaps=100, rounds=1, **PLAIN)

    def loss(keep: Tensor) -> float:
        return best(W, H, columns(keep, groups, 10))[1]

    everything = [
        loss(torch.tensor([i in chosen for i in range(10)])) for chosen in itertools.combinations(range(10), 5)
    ]
    assert min(everything) * (1 - 1e-9) <= loss(keep) <= loss(first)
    # the exchange that is tried: the most useful part back, then the cheapest out
    gone = (~keep).nonzero()[:, 0].tolist()
    back = min(gone, key=lambda p: loss(keep | (torch.arange(10) == p)))
    with_it = keep | (torch.arange(10) == back)
    after = min(loss(with_it & (torch.arange(10) != p)) for p in with_it.nonzero()[:, 0].tolist())
    assert after >= loss(keep) * (1 - 1e-6)


def test_the_dense_target_moves_the_outputs_towards_those_of_the_dense_model():
    g = torch.Generator().manual_seed(1)
    W, dense = torch.randn(5, 12, generator=g), torch.randn(300, 12, generator=g)
    X = dense + 0.3 * torch.randn(300, 12, generator=g)
    stats = LayerStats(300, 1, gram=X.T @ X, drift=(dense - X).T @ X)
    errors = []
    for target in (0.0, 0.5, 1.0):
        _, V = obs(W, stats, torch.arange(12)[:, None], 9, dense_target=target, damping=1e-4)
        errors.append(float((dense @ W.T - X @ V.T).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.98 * errors[0]


def test_the_gram_matrix_is_shrunk_towards_its_diagonal_by_columns_over_columns_and_tokens():
    W, stats, groups = case(0, 20, 1)  # of 100 tokens
    stats = replace(stats, drift=0.1 * stats.gram)
    shrunk = stats.gram * (100 / 120)
    shrunk.diagonal().copy_(stats.gram.diagonal())
    target = {**PLAIN, "dense_target": 0.5}
    expected = obs(W, replace(stats, gram=shrunk), groups, 12, **target)
    torch.testing.assert_close(obs(W, stats, groups, 12, **{**target, "shrinkage": 1.0}), expected)


def test_with_few_tokens_it_loses_less_on_other_text_for_being_shrunk():
    losses = torch.zeros(2)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        common = torch.randn(4, 48, generator=g)
        X, other = (torch.randn(n, 4, generator=g) @ common + torch.randn(n, 48, generator=g) for n in (64, 2000))
        W, stats = torch.randn(5, 48, generator=g), LayerStats(64, 1, gram=X.T @ X)
        for i, shrinkage in enumerate((0.0, 1.0)):
            _, V = obs(W, stats, torch.arange(48)[:, None], 36, **{**PLAIN, "shrinkage": shrinkage})
            losses[i] += (other @ (W - V).T).square().sum()
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "options", [{"damping": 0.0}, {"dense_target": 2.0}, {"rounds": 0}, {"swaps": -1}, {"shrinkage": 1.5}]
)
def test_options_out_of_range_are_refused(options):
    W, stats, groups = case(0, 4, 1)
    with pytest.raises(BillhookError, match="obs: damping"):
        obs(W, stats, groups, 2, **options)
