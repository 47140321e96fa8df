"""Error curves are the errors of plain runs, and their optimum beats every choice on the grid."""

from itertools import product

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from billhook import allocate, measure, prune_
from billhook.architectures.layers import find_layers
from billhook.measurement.error_curves import STEPS, TRIED, cheaper
from billhook.plan.allocators.curves import cheapest
from billhook.plan.plan import Plan


def text(windows: int = 16) -> torch.Tensor:
    return torch.randint(0, 258, (windows, 24), generator=torch.Generator().manual_seed(0))


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.integers(1, 9)), min_size=1, max_size=4
    ),
    st.integers(0, 40),
)
def test_the_budget_is_met_and_no_grid_point_is_cheaper(layers: list[tuple[list[int], int]], part: int) -> None:
    """Rises are sorted, so that the curves are convex and equal their hulls: then the optimum beats every choice on the
    grid."""
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


def relative_error(W: torch.Tensor, V: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((W - V) @ inputs.T).square().sum() / (W @ inputs.T).square().sum())


@pytest.mark.parametrize("criterion, rel", [("admm", 0.01), ("wanda", 1e-3)])
def test_curves_are_the_errors_of_plain_runs(criterion: str, rel: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all rows each level of the stack is the criterion's own result, but for counts that admm rounds. Wanda sees
    input norms only."""
    model, ids = tiny.llama(), text(8)
    layer = find_layers(model)[0]
    monkeypatch.setattr("billhook.measurement.error_curves.ROWS", layer.shape[0])
    table = measure(model, [f"error_curve:{criterion}"], batches=ids)
    assert all(len(row.curves[f"error_curve:{criterion}"]) == STEPS + 1 for row in table)
    seen: list[torch.Tensor] = []
    handle = layer.module.register_forward_pre_hook(lambda module, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    inputs = seen[0] if criterion == "admm" else seen[0].norm(dim=0).diag()
    curve = table.rows[0].curves[f"error_curve:{criterion}"]
    assert curve[0] == 0
    assert curve[-1] == 1
    for s in TRIED:
        pruned = tiny.llama()
        prune_(
            pruned,
            _only(layer, s),
            criterion=criterion,
            batches=[ids],
            layers=find_layers(pruned)[:1],
            **cheaper(criterion, [layer]),
        )
        error = relative_error(layer.weight, find_layers(pruned)[0].weight, inputs)
        assert curve[round(s * STEPS)] == pytest.approx(error, rel=rel)


def test_curves_of_some_rows_are_near_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows in (8, 1000):
        monkeypatch.setattr("billhook.measurement.error_curves.ROWS", rows)
        found.append(measure(tiny.llama(), ["error_curve:admm"], batches=text(8)).curve("error_curve:admm"))
    assert found[0] != found[1]
    for some, every in zip(*found, strict=True):
        assert 0.5 < some[20] / every[20] < 2


def _only(layer, sparsity: float) -> Plan:
    table = measure(tiny.llama(), [], layers=[layer])
    return allocate(table, sparsity)
