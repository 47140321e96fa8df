"""ADMM against a plain alternation with explicit inverses, and its schedule."""

import pytest
import torch
from random_layers import layer, selection

from billhook.methods.masks import Select
from billhook.methods.sparse import CRITERIA
from billhook.methods.sparse.admm import admm, default_steps
from billhook.methods.statistics import LayerStats

Tensor = torch.Tensor


def largest(X: Tensor, select: Select, part: float) -> Tensor:
    """The mask that keeps the largest of each row (or of each group), when only `part` of the zeros are wanted."""
    rows, columns = X.shape
    width = select.keep_of[1] if select.keep_of else columns
    gone = select.keep_of[1] - select.keep_of[0] if select.keep_of else round(select.zeros * part) // rows
    extra = 0 if select.keep_of else round(select.zeros * part) - gone * rows
    order = X.abs().view(-1, width).argsort(1)
    keep = torch.ones_like(X, dtype=torch.bool).view(-1, width).scatter(1, order[:, :gone], False)
    if extra:  # one more in the rows whose next weight is the smallest
        nearest = X.abs().gather(1, order[:, gone : gone + 1])[:, 0].argsort()[:extra]
        keep[nearest, order[nearest, gone]] = False
    return keep.view(rows, columns)


def plain_admm(W: Tensor, gram: Tensor, select: Select, steps: int, rho: float) -> tuple[Tensor, list[float]]:
    """The alternation of the module's docstring, and the factors by which rho rose."""
    H = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    scale = H.diagonal().sqrt()
    H, X = gram / scale / scale[:, None], W * scale
    H.diagonal().fill_(1.0)
    one = torch.eye(len(H), dtype=H.dtype)
    ramp = 0 if select.keep_of else min(steps, 9)  # steps until all are wanted
    U, V, before, rises = torch.zeros_like(X), X, None, []
    for k in range(1, steps + 1):
        keep = largest(V + U, select, 1 - (1 - k / ramp) ** 3 if k < ramp else 1.0)
        Z = (V + U) * keep
        U = U + V - Z
        if k % 3 == 0 and ramp <= k < steps:
            # a weight that enters the mask and the one that leaves it are one change
            changed = 1.0 if before is None else int((keep != before).sum()) / 2 / int(keep.sum())
            if changed == 0:
                break
            rises.append(1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1)
            rho, U, before = rho * rises[-1], U / rises[-1], keep
        V = X + rho * (Z - U - X) @ torch.linalg.inv(H + rho * one)
    else:
        keep = largest(V + U, select, 1.0)
    optimum = torch.zeros_like(X)
    for row, kept in enumerate(keep):
        optimum[row, kept] = torch.linalg.solve(H[kept][:, kept], (H @ X[row])[kept])
    return optimum / scale, rises


@pytest.mark.parametrize(
    ("rows", "columns", "steps", "keep_of", "rises"),
    [
        (24, 40, 40, None, {1.3, 1.2, 1.1}),  # rho rises by each of the factors
        (6, 40, 48, None, {1.3, 1.2}),  # ends before the last step, when the mask no longer changes
        (24, 40, 5, None, set()),
        (24, 40, 20, (2, 4), {1.3, 1.2}),
    ],
)
def test_admm_agrees_with_a_plain_alternation(
    rows: int, columns: int, steps: int, keep_of: tuple[int, int] | None, rises: set[float]
) -> None:
    W, stats, _ = layer(rows, columns, shared=0.8)
    W, gram = W.double(), (stats.gram + stats.gram.T).double() / 2
    select = selection(W, 0.5 if keep_of else 0.6, keep_of=keep_of)
    expected, rose = plain_admm(W, gram, select, steps, 0.05)
    result = admm(W, LayerStats(99, 1, gram=gram), select, steps=steps, rho=0.05)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)
    assert set(rose) == rises


def test_wide_layers_get_fewer_steps_and_a_larger_rho() -> None:
    assert {n: default_steps(n) for n in (8, 192, 256, 512, 1024, 1536, 14336)} == {
        8: 48, 192: 48, 256: 36, 512: 18, 1024: 3, 1536: 2, 14336: 2,
    }  # fmt: skip
    for columns, rho in ((64, 0.3), (520, 0.6)):
        W, stats, _ = layer(32, columns, shared=0.8)
        found, same, other = (
            admm(W, stats, selection(W, 0.6), steps=3, **given) for given in ({}, {"rho": rho}, {"rho": 0.9 - rho})
        )
        assert torch.equal(found, same)
        assert not torch.equal(found, other)


@pytest.mark.parametrize("name", ["sparsegpt", "admm"])
@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_inputs_that_are_always_zero_do_not_change_the_others(name: str, dense_target: float) -> None:
    """Half of the inputs more, all zero: the damping is the same, and each row loses their weights besides its own."""
    W, stats, x = layer(8, 24)
    gram = (stats.gram + stats.gram.T).double() / 2
    drift = 0.1 * (x.double().roll(1, 1) - x.double()).T @ x.double()
    live = torch.arange(36) % 3 > 0
    wide, wide_gram, wide_drift = (torch.zeros(*shape, dtype=torch.float64) for shape in ((8, 36), (36, 36), (36, 36)))
    wide[:, live], wide[:, ~live] = W.double(), 1.0
    wide_gram[live.outer(live)], wide_drift[live.outer(live)] = gram.flatten(), drift.flatten()
    options = {"dense_target": dense_target, "damping": 0.3} | ({"steps": 1} if name == "admm" else {})
    criterion = CRITERIA.get(name)
    expected = criterion(W.double(), LayerStats(99, 1, gram=gram, drift=drift), selection(W, 0.5), **options)
    dead = LayerStats(99, 1, gram=wide_gram, drift=wide_drift)
    result = criterion(wide, dead, selection(wide, (12 + 12) / 36), **options)
    assert not result[:, ~live].any()
    torch.testing.assert_close(result[:, live], expected, rtol=1e-9, atol=1e-12)
