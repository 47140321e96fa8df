"""SparseGPT against plain loops and the published loop; inputs that are always zero; factorizations that fail."""

import math
from typing import Any

import pytest
import torch
from random_layers import layer, selection

from billhook.errors import BillhookError, JobError
from billhook.methods.least_squares import invert_lower_
from billhook.methods.masks import Select
from billhook.methods.sparse import CRITERIA
from billhook.methods.sparse.sparsegpt import sparsegpt
from billhook.methods.statistics import LayerStats

Tensor = torch.Tensor


def slow_sparsegpt(W: Tensor, gram: Tensor, sparsity: float, width: int) -> list[list[float]]:
    """Algorithm 1 in plain Python floats: U from the inverse of H, one column at a time, floor counts, group
    "layer"."""
    n, w = len(gram), W.tolist()
    H = gram.tolist()
    damp = 0.01 * sum(H[j][j] for j in range(n)) / n
    inverse = torch.linalg.inv(gram + damp * torch.eye(n, dtype=gram.dtype)).tolist()
    U = [[0.0] * n for _ in range(n)]
    for i in range(n):
        U[i][i] = math.sqrt(inverse[i][i] - sum(U[k][i] ** 2 for k in range(i)))
        for j in range(i + 1, n):
            U[i][j] = (inverse[i][j] - sum(U[k][i] * U[k][j] for k in range(i))) / U[i][i]
    for start in range(0, n, width):
        columns = range(start, min(start + width, n))
        score = {(r, c): (w[r][c] / U[c][c]) ** 2 for r in range(len(w)) for c in columns}
        threshold = sorted(score.values())[int(len(score) * sparsity)]
        for c in columns:
            for r in range(len(w)):
                if score[r, c] <= threshold:
                    error = w[r][c] / U[c][c]
                    for later in range(c, n):
                        w[r][later] -= error * U[c][later]
                    w[r][c] = 0.0
    return w


def test_sparsegpt_agrees_with_plain_loops() -> None:
    W, stats, _ = layer(6, 22)
    W, gram = W.double(), stats.gram.double()
    result = sparsegpt(W, LayerStats(1, 1, gram=gram), selection(W, 0.55, "layer", "floor"), block_size=8)
    torch.testing.assert_close(result, torch.tensor(slow_sparsegpt(W, gram, 0.55, 8), dtype=torch.float64))


def published_sparsegpt(W: Tensor, gram: Tensor, select: Select, width: int = 128) -> Tensor:
    """The column loop as published: every removed weight updates all later columns of its block at once."""
    W, n = W.clone(), W.shape[1]
    H = gram + 0.01 * gram.diagonal().mean() * torch.eye(n, dtype=W.dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, n, width):
        stop = min(start + width, n)
        block, part = W[:, start:stop].clone(), U[start:stop, start:stop]
        keep = torch.ones_like(block, dtype=torch.bool)
        errors = torch.zeros_like(block)
        for j in range(stop - start):
            size = select.keep_of[1] if select.keep_of else stop - start
            if j % size == 0:
                keep[:, j : j + size] = select((block**2 / part.diagonal() ** 2)[:, j : j + size], start + j)
            error = block[:, j] * ~keep[:, j] / part[j, j]
            block[:, j:] -= error[:, None] @ part[j, None, j:]
            errors[:, j] = error
        W[:, start:stop] = block.masked_fill(~keep, 0)
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("rounding", ["exact", "floor"])
@pytest.mark.parametrize("sparsity, keep_of", [(0.6, None), (0.5, (2, 4)), (0.5, (4, 8)), (0.75, (1, 4))])
def test_sparsegpt_equals_the_published_loop(
    group: str, rounding: str, sparsity: float, keep_of: tuple[int, int] | None
) -> None:
    W, stats, _ = layer(20, 328)
    W, gram = W.double(), (stats.gram + stats.gram.T).double() / 2  # sums in float32 are not quite symmetric
    select = selection(W, sparsity, group, rounding, keep_of)
    ours, theirs = sparsegpt(W, LayerStats(1, 1, gram=gram), select), published_sparsegpt(W, gram, select)
    assert torch.equal(ours == 0, theirs == 0)
    torch.testing.assert_close(ours, theirs)


def test_sparsegpt_in_float32_agrees_with_float64() -> None:
    W, stats, _ = layer(64, 300)
    select = selection(W, 0.6, "layer", "floor")
    single = sparsegpt(W, stats, select)
    double = sparsegpt(W.double(), stats, select)
    same = ((single == 0) == (double == 0)).all(1)  # a row whose mask differs by a near tie goes its own way
    assert same.float().mean() > 0.9
    torch.testing.assert_close(single[same].double(), double[same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity, keep_of", [(0.5, None), (0.5, (2, 4)), (0.7, None)])
@pytest.mark.parametrize("block_size", [16, 128])
def test_sparsegpt_reconstructs_better_than_masks(
    sparsity: float, keep_of: tuple[int, int] | None, block_size: int
) -> None:
    W, stats, x = layer(16, 48, shared=0.9)
    select = selection(W, sparsity, "row", keep_of=keep_of)

    def error(result: Tensor) -> float:
        return float((x.double() @ (W - result).double().T).norm())

    result = sparsegpt(W, stats, select, block_size=block_size)
    others = [CRITERIA.get(name)(W, stats, select) for name in ("magnitude", "wanda")]
    assert error(result) < min(map(error, [*others, W.masked_fill(result == 0, 0)]))
    best = torch.zeros_like(W, dtype=torch.float64)  # least squares, the best that any values in this mask can do
    for row, kept in enumerate(result != 0):
        best[row, kept] = torch.linalg.lstsq(x[:, kept].double(), x.double() @ W[row].double()).solution
    assert error(best) <= error(result)


@pytest.mark.parametrize("keep_of, block_size", [((3, 6), 128), ((5, 10), 16), ((20, 30), 8), ((1, 2), 1)])
def test_sparsegpt_groups_never_straddle_blocks(keep_of: tuple[int, int], block_size: int) -> None:
    W, stats, _ = layer(8, 150)
    keep, of = keep_of
    result = sparsegpt(W, stats, selection(W, 1 - keep / of, keep_of=keep_of), block_size=block_size)
    assert ((result != 0).view(8, -1, of).sum(-1) == keep).all()


def test_sparsegpt_ignores_the_scale_of_the_inputs() -> None:
    W, stats, _ = layer(8, 40)
    select = selection(W, 0.5, "layer")
    scaled = LayerStats(stats.tokens, stats.sequences, gram=stats.gram * 2.0**-20)
    assert torch.equal(sparsegpt(W, stats, select), sparsegpt(W, scaled, select))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_weights_of_zero_inputs_are_removed_first_and_the_count_holds(sparsity: float) -> None:
    W, stats, _ = layer(10, 60)
    dead = torch.zeros(60, dtype=torch.bool)
    dead[::3] = True
    gram = stats.gram.clone()
    gram[dead], gram[:, dead] = 0, 0
    stats = LayerStats(stats.tokens, stats.sequences, gram=gram)
    result = sparsegpt(W, stats, selection(W, sparsity, "layer"))
    zero = result == 0
    assert zero.sum() == round(sparsity * 600)
    assert zero[:, dead].all() if sparsity > 1 / 3 else not zero[:, ~dead].any()
    kept = dead & ~zero
    assert torch.equal(result[kept], W[kept])
    if sparsity < 1 / 3:
        assert W[:, dead][zero[:, dead]].abs().max() <= W[kept].abs().min()
    assert stats.notes == ["20 of 60 inputs are zero on all calibration text; their weights are removed first"]


def test_magnitude_decides_where_all_inputs_are_zero() -> None:
    W = layer(6, 16)[0]
    select = selection(W, 0.5, "layer")
    stats = LayerStats(9, 1, gram=torch.zeros(16, 16))
    assert torch.equal(sparsegpt(W, stats, select), CRITERIA.get("magnitude")(W, stats, select))


def indefinite(off_diagonal: float) -> LayerStats:
    return LayerStats(9, 1, gram=torch.full((8, 8), off_diagonal).fill_diagonal_(1.0))


def test_damping_is_raised_with_a_note() -> None:
    W = layer(4, 8)[0]
    stats = indefinite(2.0)
    result = sparsegpt(W, stats, selection(W, 0.5, "layer"))
    assert (result == 0).sum() == 16
    assert result.isfinite().all()
    assert stats.notes == ["damping raised from 0.01 to 10: the factorization failed below it"]
    stats = LayerStats(9, 1, gram=torch.ones(8, 8))
    sparsegpt(W, stats, selection(W, 0.5, "layer"), damping=0.0)
    assert stats.notes == ["damping raised from 0 to 0.0001: the factorization failed below it"]


def test_a_factorization_that_fails_is_an_error_that_says_what_to_do() -> None:
    W = layer(4, 8)[0]
    with pytest.raises(JobError, match="even with damping 10; use more calibration text"):
        sparsegpt(W, indefinite(100.0), selection(W, 0.5))


@pytest.mark.parametrize("options", [{"block_size": 0}, {"damping": -0.1}, {"damping": math.inf}])
def test_sparsegpt_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    W, stats, _ = layer(4, 8)
    with pytest.raises(BillhookError, match="sparsegpt: block_size"):
        sparsegpt(W, stats, selection(W, 0.5), **options)


@pytest.mark.parametrize("size", [1, 7, 300, 512])
def test_the_triangular_inverse_is_exact(size: int) -> None:
    L = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril() / size
    L.diagonal().abs_().add_(1)
    inverse = invert_lower_(L.clone(), leaf=100)
    torch.testing.assert_close(L @ inverse, torch.eye(size, dtype=torch.float64))
    assert inverse.triu(1).count_nonzero() == 0
