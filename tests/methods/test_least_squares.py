"""Reconstruction: optima against enumeration and plain solves, guarantees against the plain mask, and inputs that are
no good."""

from itertools import combinations

import pytest
import torch

from billhook.errors import BillhookError
from billhook.methods.least_squares import inverse_factor, loss, reverse_, shift_to_dense, shrunk, solve_support
from billhook.methods.masks import Select
from billhook.methods.sparse.admm import admm
from billhook.methods.sparse.sparsegpt import sparsegpt
from billhook.methods.statistics import LayerStats

Tensor = torch.Tensor
Patch = pytest.MonkeyPatch


def problem(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Weights and the Gram matrix, float64, of inputs that share directions and differ in scale by up to 30 times."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 3 * columns
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5 + 0.5 * torch.eye(
        columns
    )
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    x *= 10 ** (1.5 * torch.rand(columns, generator=generator, dtype=torch.float64))
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def selection(W: Tensor, sparsity: float, group: str = "row", keep_of: tuple[int, int] | None = None) -> Select:
    return Select((W.shape[0], W.shape[1]), sparsity, round(sparsity * W.numel()), keep_of, group)  # type: ignore[arg-type]


def slow_solution(w: Tensor, H: Tensor, support: list[int]) -> Tensor:
    """The least-squares optimum of one row on a support, by a dense inverse."""
    v = torch.zeros_like(w)
    v[support] = torch.linalg.inv(H[support][:, support]) @ (H @ w)[support]
    return v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direct", [True, False])
def test_the_solution_on_a_support_is_the_optimum(direct: bool, dtype: torch.dtype, monkeypatch: Patch) -> None:
    monkeypatch.setattr("billhook.methods.least_squares.DIRECT", 256 if direct else 0)
    monkeypatch.setattr("billhook.methods.least_squares.TOLERANCE", 1e-10)
    W, gram = problem(12, 40)
    H = damped(gram)
    keep = torch.rand(12, 40, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[3] = False
    keep[4] = True
    solution = solve_support(W.to(dtype), H.to(dtype), keep, steps=400)
    assert solution is not None
    assert solution.exact == direct
    expected = torch.stack([slow_solution(w, H, k.nonzero()[:, 0].tolist()) for w, k in zip(W, keep, strict=True)])
    bound = 1e-6 if dtype == torch.float64 else 2e-4
    assert float((solution.weight - expected).norm() / expected.norm()) < bound
    assert solution.residual < (1e-6 if dtype == torch.float64 else 1e-3)
    assert not solution.weight[~keep].any()


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_conjugate_gradients_never_lose_to_the_plain_mask(steps: int, monkeypatch: Patch) -> None:
    monkeypatch.setattr("billhook.methods.least_squares.DIRECT", 0)
    W, gram = problem(20, 64)
    H = damped(gram)
    keep = selection(W, 0.6)(W.abs())
    plain = loss(W, W * keep, H)
    generator = torch.Generator().manual_seed(2)
    for start in (
        None,
        W,
        100 * torch.randn(W.shape, generator=generator, dtype=W.dtype),
    ):  # the last is no good at all
        solution = solve_support(W, H, keep, start, steps)
        assert solution is not None
        assert (loss(W, solution.weight, H) <= plain * (1 + 1e-12)).all()


def test_the_best_support_is_nearly_found() -> None:
    found_best, better, worst = 0, 0, 1.0
    for seed in range(12):
        W, gram = problem(1, 10, seed)
        H = damped(gram)
        best = min(float(loss(W, slow_solution(W[0], H, list(s))[None], H)) for s in combinations(range(10), 4))
        found = float(loss(W, admm(W, LayerStats(30, 1, gram=gram), selection(W, 0.6)), H))
        other = float(loss(W, sparsegpt(W, LayerStats(30, 1, gram=gram), selection(W, 0.6)), H))
        assert found >= best * (1 - 1e-9)
        found_best += found <= best * (1 + 1e-9)
        better += found <= other * (1 + 1e-9)
        worst = max(worst, found / best)
    assert (found_best, better) == (9, 12)
    assert worst < 2


@pytest.mark.parametrize("group, keep_of", [("row", None), ("layer", None), ("row", (2, 4)), ("row", (3, 8))])
@pytest.mark.parametrize("direct", [True, False])
def test_the_update_beats_the_mask_alone(
    group: str, keep_of: tuple[int, int] | None, direct: bool, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("billhook.methods.least_squares.DIRECT", 256 if direct else 0)
    W, gram = problem(24, 64)
    H = damped(gram)
    result = admm(W, LayerStats(192, 1, gram=gram), selection(W, 0.5, group, keep_of))
    assert (loss(W, result, H) <= loss(W, W * (result != 0), H) * (1 + 1e-9)).all()


def test_more_removed_costs_more() -> None:
    W, gram = problem(24, 64)
    H = damped(gram)
    losses = [
        float(loss(W, admm(W, LayerStats(192, 1, gram=gram), selection(W, s)), H).sum())
        for s in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    ]
    assert losses == sorted(losses)


def test_rows_are_solved_independently() -> None:
    W, gram = problem(24, 64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    for group in ("row", "layer"):
        one, other = (admm(V, LayerStats(192, 1, gram=gram), selection(W, 0.6, group)) for V in (W, W[order]))
        torch.testing.assert_close(one[order], other, rtol=1e-9, atol=1e-12)


def test_float32_solutions_agree_with_float64(monkeypatch: Patch) -> None:
    """Narrow layers are computed in float64 whatever comes in; where they are not, the loss differs in the fifth
    digit."""
    W, gram = problem(24, 64)
    H = damped(gram)
    stats = LayerStats(192, 1, gram=gram)
    double = float(loss(W, admm(W, stats, selection(W, 0.6)), H).sum())
    monkeypatch.setattr("billhook.methods.sparse.admm.DOUBLE", 0)
    monkeypatch.setattr("billhook.methods.least_squares.DIRECT", 0)
    single = admm(W.float(), LayerStats(192, 1, gram=gram.float()), selection(W, 0.6), steps=48, rho=0.3)
    assert float(loss(W, single.double(), H).sum()) == pytest.approx(double, rel=1e-3)


@pytest.mark.parametrize("trouble", ["few tokens", "equal columns", "dead", "scales", "nothing"])
@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_solutions_of_degenerate_inputs_are_finite(trouble: str, damping: float) -> None:
    W, gram = problem(8, 32, tokens=5 if trouble == "few tokens" else 200)
    tokens = 5 if trouble == "few tokens" else 200
    if trouble == "equal columns":
        gram[:, 7], gram[7] = gram[:, 3], gram[3].clone()
        gram[7, 7] = gram[3, 3]
    if trouble == "dead":
        gram[:, 4:9] = 0
        gram[4:9] = 0
    if trouble == "scales":
        scale = 10 ** torch.linspace(-6, 6, 32, dtype=torch.float64)
        gram = gram * scale * scale[:, None]
    if trouble == "nothing":
        gram.zero_()
    stats = LayerStats(tokens, 1, gram=gram)
    result = admm(W, stats, selection(W, 0.5), damping=damping)
    assert result.isfinite().all()
    assert (result == 0).sum() == 128
    if trouble == "few tokens":
        assert "calibration tokens for 32 inputs" in stats.notes[0]
    if trouble in ("dead", "nothing"):
        assert "inputs are zero" in stats.notes[0]
    if trouble == "dead":
        assert not result[:, 4:9].any()
        few = admm(W, LayerStats(tokens, 1, gram=gram), selection(W, 3 / 32), damping=damping)
        kept = few[:, 4:9] != 0
        torch.testing.assert_close(few[:, 4:9][kept], W[:, 4:9][kept])
        assert (few == 0).sum() == (few[:, 4:9] == 0).sum() == 24


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"rho": 0.0}, {"damping": -1.0}, {"rho": float("inf")}, {"dense_target": 1.5}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    W, gram = problem(2, 8)
    with pytest.raises(BillhookError, match="admm"):
        admm(W, LayerStats(8, 1, gram=gram), selection(W, 0.5), **options)


def test_sparsegpt_leaves_a_single_row_as_it_was() -> None:
    W, gram = problem(1, 10)
    before = W.clone()
    sparsegpt(W, LayerStats(30, 1, gram=gram), selection(W, 0.6))
    assert torch.equal(W, before)


@pytest.mark.parametrize("columns", [90, 300])
def test_a_target_found_with_the_factor_is_that_of_a_solve(columns: int) -> None:
    W, gram = problem(4, columns)
    drift = torch.randn(columns, columns, generator=torch.Generator().manual_seed(1), dtype=gram.dtype)
    stats = LayerStats(3 * columns, 1, gram=gram, drift=drift, stream_drift=W @ drift.T)
    U = inverse_factor(gram, gram.diagonal() <= 0, 0.01, stats)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    expected = W + 0.5 * torch.linalg.solve(damped, (W @ drift + W @ drift.T).T).T
    torch.testing.assert_close(shift_to_dense(W, stats, 0.5, 0.01, U), expected)


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("size", [0, 1, 6, 7])
def test_rows_and_columns_are_reversed_in_place(size: int, rows: int) -> None:
    M = torch.arange(size * size).view(size, size)
    expected = M.flip(0, 1)
    assert reverse_(M, rows) is M
    assert torch.equal(M, expected)


def test_the_factor_is_that_of_the_inverse_of_the_shrunk_gram_matrix_which_stays_as_it_was() -> None:
    gram = problem(4, 90)[1]
    before, H = gram.clone(), shrunk(gram, 0.3)
    U = inverse_factor(gram, gram.diagonal() <= 0, 0.01, LayerStats(270, 1, gram=gram), 0.3)
    H.diagonal().add_(0.01 * gram.diagonal().mean())
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(H))
    assert torch.equal(U, U.triu())
    assert torch.equal(gram, before)
