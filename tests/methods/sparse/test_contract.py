"""Every registered criterion keeps the contract; each agrees with a slow and obvious version of itself."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from billhook.errors import BillhookError, JobError
from billhook.methods.masks import Select
from billhook.methods.sparse import CRITERIA
from billhook.methods.sparse.sparsegpt import invert_lower_, sparsegpt
from billhook.methods.statistics import GRADIENTS, STATISTICS, Collector, LayerStats

UPDATING = {"sparsegpt", "admm"}  # criteria that change kept weights
Tensor = torch.Tensor


def layer(rows: int, columns: int, shared: float = 0.3) -> tuple[Tensor, LayerStats, Tensor]:
    """A random weight, the statistics of inputs of uneven scale with a `shared` part of few directions, and those
    inputs."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(3 * columns, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    own = torch.randn(3 * columns, columns, generator=generator)
    x = (shared * common / (columns / 4) ** 0.5 + (1 - shared) * own) * (0.1 + torch.rand(columns, generator=generator))
    collector = Collector(tuple(STATISTICS), columns)
    for part in x.split(16):
        collector.add(part)
    W, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    return W, replace(collector.stats(), gradient=gradient.abs() / 100), x


def selection(
    W: Tensor, sparsity: float, group: str = "row", rounding: str = "exact", keep_of: tuple[int, int] | None = None
) -> Select:
    return Select((W.shape[0], W.shape[1]), sparsity, round(sparsity * W.numel()), keep_of, group, rounding)  # type: ignore[arg-type]


def expected_zeros(select: Select) -> int:
    rows, columns = select.shape
    if select.keep_of:
        keep, of = select.keep_of
        return rows * columns // of * (of - keep)
    if select.rounding == "exact":
        return select.zeros
    whole = int(rows * columns * select.sparsity) + (select.sparsity > 0)
    return rows * int(columns * select.sparsity) if select.group == "row" else whole


@pytest.mark.parametrize("name", CRITERIA.names())
@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("rounding", ["exact", "floor"])
@pytest.mark.parametrize(
    "sparsity, keep_of", [(0.0, None), (0.37, None), (0.8, None), (0.5, (2, 4)), (0.625, (3, 8)), (0.6, (2, 5))]
)
def test_contract(name: str, group: str, rounding: str, sparsity: float, keep_of: tuple[int, int] | None) -> None:
    W, stats, _ = layer(12, 40)
    select = selection(W, sparsity, group, rounding, keep_of)
    before, gram = W.clone(), stats.gram.clone()
    criterion = CRITERIA.get(name)
    result = criterion(W, stats, select)
    zero = result == 0
    assert zero.sum() == expected_zeros(select)
    if keep_of:
        assert (zero.view(12, -1, keep_of[1]).sum(-1) == keep_of[1] - keep_of[0]).all()
    elif group == "row":
        assert zero.sum(1).max() - zero.sum(1).min() <= (rounding == "exact")
    assert (result.shape, result.dtype) == (W.shape, W.dtype)
    assert result.isfinite().all()
    assert torch.equal(W, before)
    assert torch.equal(stats.gram, gram)
    assert torch.equal(result, criterion(W, stats, select))
    if name not in UPDATING:
        assert torch.equal(result[~zero], W[~zero])


@pytest.mark.parametrize("name", CRITERIA.names())
def test_declarations(name: str) -> None:
    options = CRITERIA.configure(name, {})
    assert set(CRITERIA.needs(name, options)) <= {*STATISTICS, *GRADIENTS}
    assert CRITERIA.group(name) in ("row", "layer")
    assert "arXiv" in CRITERIA.paper(name) or name == "ria"  # published at a conference only
    assert CRITERIA.get(name).__doc__


@pytest.mark.parametrize("name", CRITERIA.names())
def test_reads_no_statistic_it_does_not_declare(name: str) -> None:
    W, stats, _ = layer(6, 20)
    needs = ["gradient" if need in GRADIENTS else need for need in CRITERIA.needs(name, CRITERIA.configure(name, {}))]
    only = {need: getattr(stats, need) for need in needs}
    CRITERIA.get(name)(W, LayerStats(stats.tokens, stats.sequences, **only), selection(W, 0.5))


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_scores_against_plain_loops(name: str, group: str) -> None:
    W, stats, x = layer(7, 20)
    norms = [1.0] * 20 if name == "magnitude" else [math.sqrt(sum(v * v for v in column)) for column in x.T.tolist()]
    score = {(r, c): abs(w) * norms[c] for r, row in enumerate(W.tolist()) for c, w in enumerate(row)}
    groups = [[(r, c) for c in range(20)] for r in range(7)] if group == "row" else [list(score)]
    removed = {place for places in groups for place in sorted(places, key=score.__getitem__)[: int(0.6 * len(places))]}
    result = CRITERIA.get(name)(W, stats, selection(W, 0.6, group))
    assert {tuple(place) for place in (result == 0).nonzero().tolist()} == removed


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


def test_sparsegpt_against_plain_loops() -> None:
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
    W, gram = W.double(), stats.gram.double()
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
def test_dead_inputs_go_first_and_the_count_holds(sparsity: float) -> None:
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


def test_all_inputs_dead_is_magnitude() -> None:
    W = layer(6, 16)[0]
    select = selection(W, 0.5, "layer")
    stats = LayerStats(9, 1, gram=torch.zeros(16, 16))
    assert torch.equal(sparsegpt(W, stats, select), CRITERIA.get("magnitude")(W, stats, select))


def indefinite(off_diagonal: float) -> LayerStats:
    return LayerStats(9, 1, gram=torch.full((8, 8), off_diagonal).fill_diagonal_(1.0))


def test_damping_is_raised_and_said() -> None:
    W = layer(4, 8)[0]
    stats = indefinite(2.0)
    result = sparsegpt(W, stats, selection(W, 0.5, "layer"))
    assert (result == 0).sum() == 16
    assert result.isfinite().all()
    assert stats.notes == ["damping raised from 0.01 to 10: the factorization failed below it"]
    stats = LayerStats(9, 1, gram=torch.ones(8, 8))
    sparsegpt(W, stats, selection(W, 0.5, "layer"), damping=0.0)
    assert stats.notes == ["damping raised from 0 to 0.0001: the factorization failed below it"]


def test_a_hopeless_factorization_is_an_error_that_says_what_to_do() -> None:
    W = layer(4, 8)[0]
    with pytest.raises(JobError, match="even with damping 10; use more calibration text"):
        sparsegpt(W, indefinite(100.0), selection(W, 0.5))


@pytest.mark.parametrize("options", [{"block_size": 0}, {"damping": -0.1}, {"damping": math.inf}])
def test_sparsegpt_options_out_of_range(options: dict[str, Any]) -> None:
    W, stats, _ = layer(4, 8)
    with pytest.raises(BillhookError, match="sparsegpt: block_size"):
        sparsegpt(W, stats, selection(W, 0.5), **options)


@pytest.mark.parametrize("size", [1, 7, 300, 512])
def test_triangular_inverse(size: int) -> None:
    L = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril() / size
    L.diagonal().abs_().add_(1)
    inverse = invert_lower_(L.clone(), leaf=100)
    torch.testing.assert_close(L @ inverse, torch.eye(size, dtype=torch.float64))
    assert inverse.triu(1).count_nonzero() == 0


def test_ria_and_pruner_zero_against_plain_loops() -> None:
    W, stats, _ = layer(5, 12)
    w, norm, g = W.tolist(), stats.input_norm.tolist(), stats.gradient.tolist()
    places = [(r, c) for r in range(5) for c in range(12)]
    size = {(r, c): abs(w[r][c]) for r, c in places}
    rows, columns = [sum(map(abs, row)) for row in w], [sum(abs(row[c]) for row in w) for c in range(12)]
    ria = {(r, c): (size[r, c] / columns[c] + size[r, c] / rows[r]) * norm[c] ** 0.5 for r, c in places}
    flat = [x for row in g for x in row]
    zero = {(r, c): size[r, c] ** 2 * (g[r][c] - min(flat)) / (max(flat) - min(flat)) for r, c in places}
    removed = {tuple(p) for p in (CRITERIA.get("ria")(W, stats, selection(W, 0.5, "layer")) == 0).nonzero().tolist()}
    assert removed == set(sorted(places, key=ria.__getitem__)[:30])
    removed = {tuple(p) for p in (CRITERIA.get("pruner_zero")(W, stats, selection(W, 0.5)) == 0).nonzero().tolist()}
    assert removed == {p for r in range(5) for p in sorted(places[12 * r : 12 * r + 12], key=zero.__getitem__)[:6]}


@pytest.mark.parametrize("keep_of", [None, (2, 4)])
def test_dsnot_against_plain_loops(keep_of: tuple[int, int] | None) -> None:
    W, _, x = layer(9, 24)
    x = x + torch.linspace(-1, 1, 24)
    collector = Collector(("input_norm", "input_mean"), 24)
    collector.add(x)
    stats = collector.stats()
    result = CRITERIA.get("dsnot")(W, stats, selection(W, 0.5, keep_of=keep_of), cycles=3, threshold=0.0)
    mean, variance, norm = x.mean(0).tolist(), x.var(0, correction=0).tolist(), x.norm(dim=0).tolist()
    wanda = CRITERIA.get("wanda")(W, stats, selection(W, 0.5, keep_of=keep_of))
    for w, start, got in zip(W.tolist(), wanda, result, strict=True):
        keep = {j for j in range(24) if start[j] != 0}
        error = sum(w[j] * mean[j] for j in range(24) if j not in keep)
        for _ in range(3):
            sign = math.copysign(1, error)
            back = max((j for j in range(24) if j not in keep), key=lambda j: sign * w[j] * mean[j] / variance[j])
            fits = [j for j in keep if sign * w[j] * mean[j] < 0 and (not keep_of or j // 4 == back // 4)]
            if not fits or sign * w[back] * mean[back] <= 0:
                break
            out = min(fits, key=lambda j: abs(w[j]) * norm[j])
            after = error - w[back] * mean[back] + w[out] * mean[out]
            if abs(after) >= abs(error):
                break
            keep, error = keep - {out} | {back}, after
        assert set(got.nonzero()[:, 0].tolist()) == keep
    assert not torch.equal(result, wanda)
