"""Every registered criterion keeps the contract; the simple ones agree with plain loops."""

import math

import pytest
import torch
from random_layers import layer, selection

from billhook.methods.masks import Select
from billhook.methods.sparse import CRITERIA
from billhook.methods.statistics import GRADIENTS, STATISTICS, Collector, LayerStats

UPDATING = {"sparsegpt", "admm"}  # criteria that change kept weights


Tensor = torch.Tensor


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
def test_every_criterion_keeps_the_contract(
    name: str, group: str, rounding: str, sparsity: float, keep_of: tuple[int, int] | None
) -> None:
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
def test_every_criterion_declares_paper_statistics_and_group(name: str) -> None:
    options = CRITERIA.configure(name, {})
    assert set(CRITERIA.needs(name, options)) <= {*STATISTICS, *GRADIENTS}
    assert CRITERIA.group(name) in ("row", "layer")
    assert "arXiv" in CRITERIA.paper(name) or name == "ria"  # published at a conference only
    assert CRITERIA.get(name).__doc__


def test_defaults_and_groups_are_the_published_ones() -> None:
    """Those of `admm` are ours, but for the damping."""
    assert {name: (CRITERIA.group(name), CRITERIA.configure(name, {})) for name in CRITERIA._built_in} == {
        "magnitude": ("layer", {}),
        "wanda": ("row", {}),
        "gblm": ("row", {"norm": "l1", "scale": 100.0, "mode": "paper"}),
        "ria": ("layer", {"power": 0.5}),
        "dsnot": ("row", {"cycles": 50, "threshold": 0.1}),
        "wandapp": ("row", {"alpha": 100.0}),
        "gradient": ("row", {"norm": "l1"}),
        "pruner_zero": ("row", {}),
        "sparsegpt": ("layer", {"block_size": 128, "damping": 0.01, "dense_target": 0.0}),
        "admm": ("row", {"steps": None, "rho": None, "damping": 0.01, "dense_target": 0.5}),
    }


@pytest.mark.parametrize("name", CRITERIA.names())
def test_no_criterion_reads_an_undeclared_statistic(name: str) -> None:
    W, stats, _ = layer(6, 20)
    needs = ["gradient" if need in GRADIENTS else need for need in CRITERIA.needs(name, CRITERIA.configure(name, {}))]
    only = {need: getattr(stats, need) for need in needs}
    CRITERIA.get(name)(W, LayerStats(stats.tokens, stats.sequences, **only), selection(W, 0.5))


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_scores_agree_with_plain_loops(name: str, group: str) -> None:
    W, stats, x = layer(7, 20)
    norms = [1.0] * 20 if name == "magnitude" else [math.sqrt(sum(v * v for v in column)) for column in x.T.tolist()]
    score = {(r, c): abs(w) * norms[c] for r, row in enumerate(W.tolist()) for c, w in enumerate(row)}
    groups = [[(r, c) for c in range(20)] for r in range(7)] if group == "row" else [list(score)]
    removed = {place for places in groups for place in sorted(places, key=score.__getitem__)[: int(0.6 * len(places))]}
    result = CRITERIA.get(name)(W, stats, selection(W, 0.6, group))
    assert {tuple(place) for place in (result == 0).nonzero().tolist()} == removed


def test_scores_with_sums_and_gradients_agree_with_plain_loops() -> None:
    W, stats, _ = layer(5, 12)
    w, norm, g = W.tolist(), stats.input_norm.tolist(), stats.gradient.tolist()
    places = [(r, c) for r in range(5) for c in range(12)]
    size = {(r, c): abs(w[r][c]) for r, c in places}
    rows, columns = [sum(map(abs, row)) for row in w], [sum(abs(row[c]) for row in w) for c in range(12)]
    flat = [x for row in g for x in row]
    scores = {
        "ria": {(r, c): (size[r, c] / columns[c] + size[r, c] / rows[r]) * norm[c] ** 0.5 for r, c in places},
        "pruner_zero": {(r, c): size[r, c] ** 2 * (g[r][c] - min(flat)) / (max(flat) - min(flat)) for r, c in places},
        "wandapp": {(r, c): size[r, c] * (100 * g[r][c] + norm[c]) for r, c in places},
    }
    for name, score in scores.items():
        group = CRITERIA.group(name)
        groups = [places] if group == "layer" else [[(r, c) for c in range(12)] for r in range(5)]
        lowest = {p for places in groups for p in sorted(places, key=score.__getitem__)[: len(places) // 2]}
        result = CRITERIA.get(name)(W, stats, selection(W, 0.5, group))
        assert {tuple(place) for place in (result == 0).nonzero().tolist()} == lowest, name


@pytest.mark.parametrize("cycles, threshold", [(3, 0.0), (50, 0.5), (50, 0.05)])
@pytest.mark.parametrize("keep_of", [None, (2, 4)])
def test_dsnot_agrees_with_plain_loops(keep_of: tuple[int, int] | None, cycles: int, threshold: float) -> None:
    W, _, x = layer(9, 24)
    x = x + torch.linspace(-1, 1, 24)
    collector = Collector(("input_norm", "input_mean"), 24)
    collector.add(x)
    stats = collector.stats()
    result = CRITERIA.get("dsnot")(W, stats, selection(W, 0.5, keep_of=keep_of), cycles=cycles, threshold=threshold)
    mean, variance, norm = x.mean(0).tolist(), x.var(0, correction=0).tolist(), x.norm(dim=0).tolist()
    wanda = CRITERIA.get("wanda")(W, stats, selection(W, 0.5, keep_of=keep_of))
    for w, start, got in zip(W.tolist(), wanda, result, strict=True):
        keep = {j for j in range(24) if start[j] != 0}
        error = sum(w[j] * mean[j] for j in range(24) if j not in keep)
        enough = threshold * abs(error)
        for _ in range(cycles):
            if abs(error) <= enough:
                break
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
