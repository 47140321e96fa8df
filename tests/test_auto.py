"""The allocation that knows the solver: exact optimum and budget, curves against plain runs, never worse than uniform, and its refusals."""

from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from billhook import BillhookError, allocate, measure, prune
from billhook.allocators.auto import cheapest
from billhook.arch import find_layers
from billhook.error_curves import CHEAPER, MIDDLE, STEPS
from billhook.job import prepare
from billhook.plan import SparsityPlan
from billhook.pruning import prune_
from billhook.request import Request
from billhook.trials import Bench, Setting


def text(windows: int = 16) -> torch.Tensor:
    return torch.randint(0, 258, (windows, 24), generator=torch.Generator().manual_seed(0))


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 40)
)
def test_the_budget_is_met_and_no_grid_point_is_cheaper(layers: list[tuple[list[int], int]], part: int) -> None:
    """Rises are sorted, so that the curves are convex and equal their hulls: then the optimum beats every choice on the grid."""
    curves = [[0.0, *(float(sum(sorted(rises)[: k + 1])) for k in range(4))] for rises, _ in layers]
    n, target = [size for _, size in layers], part / 40
    shares = cheapest(curves, n, target)
    assert sum(s * k for s, k in zip(shares, n, strict=True)) == pytest.approx(target * sum(n), abs=1e-9)

    def at(curve: list[float], s: float) -> float:
        k = min(int(s * 4), 3)
        return curve[k] + (curve[k + 1] - curve[k]) * (4 * s - k)

    cost = sum(at(curve, s) for curve, s in zip(curves, shares, strict=True))
    for choice in product(range(5), repeat=len(n)):
        if sum(c / 4 * k for c, k in zip(choice, n, strict=True)) >= target * sum(n) - 1e-9:
            assert cost <= sum(curve[c] for curve, c in zip(curves, choice, strict=True)) + 1e-6


@pytest.mark.parametrize("criterion", ["admm", "wanda", "magnitude"])
def test_curves_are_what_pruning_a_layer_alone_costs(criterion: str) -> None:
    model, ids = tiny.llama(), text(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = measure(model, [f"error_curve:{criterion}"], batches=ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    curves = dict(zip(table.shapes, table.curve(f"error_curve:{criterion}"), strict=True))
    for curve in curves.values():
        assert len(curve) == STEPS + 1
        assert curve[0] == 0
        assert list(curve) == sorted(curve)
    layer = find_layers(model)[0]  # the first block's inputs are those of the dense model
    with torch.no_grad():
        dense = model(ids[-4:]).logits.log_softmax(-1)
        prune_(model, _only(layer, MIDDLE), criterion=criterion, batches=[ids], layers=[layer], **CHEAPER.get(criterion, {}))
        now = model(ids[-4:]).logits.log_softmax(-1)
    kl = float((dense.exp() * (dense - now)).sum(-1)[:, :-1].mean())
    assert curves[layer.name][round(MIDDLE * STEPS)] == pytest.approx(kl, rel=1e-3)


def _only(layer, sparsity: float) -> SparsityPlan:
    table = measure(tiny.llama(), [], layers=[layer])
    return allocate(table, sparsity)


def divergence(plan: SparsityPlan, request: Request) -> float:
    """On the held-out windows that the plan says it was tried on."""
    from billhook.heldout import split_windows
    from billhook.request import open_request

    opened = open_request(request, True, "x")
    split = split_windows(opened, request.seed)
    with Bench(
        opened.model, opened.layers, split.batches, split.heldout, Setting(request.criterion, CHEAPER.get(request.criterion, {}))
    ) as bench:
        bench.prune(plan)
        kl = bench.losses(0, len(split.heldout)).kl
    return sum(kl) / len(kl)


@pytest.mark.parametrize("criterion", ["wanda", "admm"])
def test_auto_is_exact_deterministic_and_not_worse_than_uniform(criterion: str) -> None:
    model = tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    request = Request(model, 0.6, criterion=criterion, allocator="auto", calibration=text())
    job, again = prepare(request), prepare(request)
    assert job.plan == again.plan
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shapes = {layer.name: layer.shape for layer in job.opened.layers}
    assert sum(job.plan.zeros(shapes).values()) == round(0.6 * sum(a * b for a, b in shapes.values()))
    tried = job.plan.made_by["auto"]["tried"]
    assert set(tried) >= {"uniform", "strength 1", "owl"}
    assert tried[job.plan.made_by["auto"]["best"]] == min(tried.values()) <= tried["uniform"]
    assert divergence(job.plan, request) == pytest.approx(min(tried.values()), rel=1e-6)


def test_options_that_auto_would_not_read_are_refused(tmp_path: Path) -> None:
    fields = {"sparsity": 0.5, "allocator": "auto", "strength": 0.5, "output": tmp_path / "out"}
    with pytest.raises(BillhookError, match="auto tries its own options here: leave out strength, or use billhook plan"):
        prune(tiny.save(tmp_path / "model"), **fields)


def test_auto_is_uniform_with_a_reason_where_text_is_short() -> None:
    plan = prepare(Request(tiny.llama(), 0.6, criterion="wanda", allocator="auto", calibration=text(3))).plan
    assert set(plan.sparsity.values()) == {0.6}
    assert "too few to split" in plan.made_by["auto"]["reason"]


def test_patterns_keep_their_groups() -> None:
    plan = prepare(Request(tiny.llama(), pattern="4:8", criterion="wanda", allocator="auto", calibration=text(8))).plan
    assert all(round(8 * s) == pytest.approx(8 * s) for s in plan.sparsity.values())
