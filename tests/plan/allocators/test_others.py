"""The other allocators and the mixed mapping against plain loops, and what they say to bad input."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook import find_layers, measure
from billhook.errors import BillhookError
from billhook.measurement.quantiles import LEVELS, lamp_quantiles, magnitude_quantiles
from billhook.plan.allocators import allocate
from billhook.plan.table import Row, Table

relaxed = settings(deadline=None, max_examples=30)


def column_table(name: str, values: list[float], size: int = 8) -> Table:
    return Table(tuple(Row(f"b{i}", i, "w", (size, size), {name: value}) for i, value in enumerate(values)))


def shares(table: Table, target: float, name: str, **options: object) -> list[float]:
    return list(allocate(table, target, allocator=name, **options).sparsity.values())


# DLP


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_dlp_is_the_published_window(statistic: str) -> None:
    scores = [0.2, 0.5, 0.3, 0.9]
    u = [1 - s / sum(scores) for s in scores]
    window = [(x - min(u)) / (max(u) - min(u)) * 2 * 0.15 for x in u]
    kept = [x - sum(window) / 4 + (1 - 0.7) for x in window]
    table = column_table(f"wanda_{statistic}", scores)
    assert shares(table, 0.7, "dlp", statistic=statistic) == pytest.approx([1 - k for k in kept], abs=1e-12)


def test_dlp_prunes_more_where_scores_are_large() -> None:
    small, large = shares(column_table("wanda_mean", [1.0, 2.0]), 0.5, "dlp")
    assert small == pytest.approx(0.35)
    assert large == pytest.approx(0.65)


# ER


def test_er_follows_the_shapes_and_caps_at_dense() -> None:
    table = Table((Row("a", 0, "a", (8, 8)), Row("b", 0, "b", (64, 64)), Row("c", 1, "c", (64, 16))))
    a, b, c = shares(table, 0.7, "er")
    assert a == 0  # its density would be above 1
    assert (1 - c) / (1 - b) == pytest.approx(((64 + 16) / (64 * 16)) / ((64 + 64) / (64 * 64)))


# Thresholds


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 60, generator=generator) * scale for scale in (1.0, 0.5, 0.1)]


def curve_table(name: str, curves: list[list[float]]) -> Table:
    return Table(tuple(Row(f"b{i}", i, "w", (40, 60), {}, {name: tuple(curve)}) for i, curve in enumerate(curves)))


@pytest.mark.parametrize("target", [0.1, 0.5, 0.66, 0.9])
def test_global_is_one_threshold_over_all_weights(target: float) -> None:
    matrices = weights()
    threshold = torch.cat([w.abs().flatten() for w in matrices]).sort().values[int(target * 3 * 2400)]
    expected = [float((w.abs() < threshold).double().mean()) for w in matrices]
    table = curve_table("magnitude_quantiles", [magnitude_quantiles(w) for w in matrices])
    assert shares(table, target, "global", floor=0) == pytest.approx(expected, abs=1 / LEVELS / 2)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_lamp_is_one_threshold_over_its_scores(target: float) -> None:
    matrices = [weights()[0], weights(1)[2].pow(3)]
    scores = []
    for w in matrices:
        squares = w.double().square().flatten()
        scores.append(torch.stack([s / squares[squares >= s].sum() for s in squares]))
    threshold = torch.cat(scores).sort().values[int(target * 2 * 2400)]
    expected = [float((s < threshold).double().mean()) for s in scores]
    table = curve_table("lamp_quantiles", [lamp_quantiles(w) for w in matrices])
    assert shares(table, target, "lamp") == pytest.approx(expected, abs=1 / LEVELS / 2)


def test_the_floor_protects_a_layer_of_small_weights() -> None:
    table = curve_table("magnitude_quantiles", [magnitude_quantiles(w) for w in weights()])
    assert shares(table, 0.5, "global", floor=0)[2] > 0.95
    assert shares(table, 0.5, "global", floor=0.2)[2] == pytest.approx(0.8)
    assert max(shares(table, 0.9, "global", floor=0.5)) == pytest.approx(
        0.9
    )  # more than 1 - S cannot be kept everywhere
    with pytest.raises(BillhookError, match=r"floor.*must be in \[0, 1\)"):
        shares(table, 0.5, "global", floor=1)


@relaxed
@given(
    curves=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=2, max_size=6), min_size=1, max_size=5),
    target=st.floats(0, 0.99),
)
def test_tied_scores_keep_the_budget(curves: list[list[float]], target: float) -> None:
    table = curve_table("lamp_quantiles", [sorted(curve) for curve in curves])
    assert sum(shares(table, target, "lamp")) == pytest.approx(target * len(curves), abs=1e-9)


def test_shares_between_two_quantiles_are_interpolated() -> None:
    """Scores uniform in [0, 1] and [0, 4]: the threshold is 0.8."""
    assert shares(curve_table("lamp_quantiles", [[0, 1], [0, 4]]), 0.5, "lamp") == pytest.approx([0.8, 0.2])


def test_quantiles_are_those_of_the_scores() -> None:
    w = weights()[0]
    curve = magnitude_quantiles(w)
    assert len(curve) == LEVELS + 1
    assert curve == sorted(curve)
    assert (curve[0], curve[-1]) == (float(w.abs().min()), float(w.abs().max()))
    assert curve[LEVELS // 2] == pytest.approx(float(w.abs().median()), abs=2e-3)
    assert lamp_quantiles(w)[-1] == 1.0
    assert set(lamp_quantiles(torch.zeros(4, 4))) == {0.0}


# Sensitivity


def test_sensitivity_protects_the_block_that_hurts() -> None:
    harmless, noise, bad = shares(column_table("block_loss:0.6", [0.001, -0.5, 0.1]), 0.5, "sensitivity", epsilon=0.2)
    assert harmless == noise
    assert harmless / bad == pytest.approx(1.2 / 0.8)
    with pytest.raises(BillhookError, match=r"epsilon must be in \[0, 1\]"):
        shares(column_table("block_loss:0.6", [1.0]), 0.5, "sensitivity", epsilon=-0.1)


def test_sensitivity_agrees_with_plain_loops() -> None:
    """Rises below a thousandth count as a thousandth, and enter by their logarithms."""
    rises = [0.004, 0.0002, -0.1, 0.3, 0.02]
    q = [-math.log(max(rise, 0.001)) for rise in rises]
    r = [(x - min(q)) / (max(q) - min(q)) * 0.4 + 0.8 for x in q]
    expected = [0.6 * x / (sum(r) / len(r)) for x in r]
    assert shares(column_table("block_loss:0.6", rises), 0.6, "sensitivity") == pytest.approx(expected, abs=1e-12)


# Curves


def error_table(curves: list[Callable[[float], float]], losses: list[float], sizes: list[int]) -> Table:
    return Table(
        tuple(
            Row(f"b{i}", i, "w", (8, n), {"loss_share:admm": loss}, {"error_curve:admm": tuple(map(curve, GRID))})
            for i, (curve, loss, n) in enumerate(zip(curves, losses, sizes, strict=True))
        )
    )


GRID = [k / 40 for k in range(41)]


def test_curves_have_the_least_sum_of_losses_measured_at_60_per_cent() -> None:
    curves: list[Callable[[float], float]] = [lambda s: s**2, lambda s: s**4, lambda s: (math.exp(5 * s) - 1) / 200]
    losses, sizes = [0.3, 0.1, 0.2], [8, 16, 8]

    def cost(at: list[float]) -> float:
        return sum(loss * curve(s) / curve(0.6) for loss, curve, s in zip(losses, curves, at, strict=True))

    table = error_table(curves, losses, sizes)
    found = shares(table, 0.5, "curves")
    best = min(([a, b, 4 * 0.5 - a - 2 * b] for a in GRID for b in GRID if 0 <= 4 * 0.5 - a - 2 * b <= 0.95), key=cost)
    assert cost(found) == pytest.approx(cost(best), rel=2e-3)
    assert found == pytest.approx(best, abs=0.03)
    half = shares(table, 0.5, "curves", strength=0.5)
    assert half == pytest.approx([(0.5 + s) / 2 for s in found], abs=1e-12)


def test_curves_remove_no_layer_unless_the_target_is_higher() -> None:
    table = error_table([lambda s: s**2] * 3, [1.0, 1.0, 1e-9], [8, 8, 8])
    assert shares(table, 0.5, "curves") == pytest.approx([0.275, 0.275, 0.95])
    assert shares(table, 0.97, "curves") == pytest.approx([0.97] * 3)


def test_block_loss_is_what_pruning_the_block_alone_costs_and_changes_nothing() -> None:
    model = tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = [torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    table = measure(model, ["block_loss:0.5"], batches=ids)
    assert table.columns() == ["block_loss:0.5"]
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    from billhook import evaluate

    dense = evaluate(model, torch.cat(ids)).nll
    for layer in find_layers(model):
        if layer.block == 2:
            flat = layer.weight.abs().flatten()
            layer.weight.copy_(
                torch.where(layer.weight.abs() > flat.kthvalue(round(0.5 * len(flat))).values, layer.weight, 0)
            )
    expected = (evaluate(model, torch.cat(ids)).nll - dense) / dense
    assert table.blocks()[2][0].metrics["block_loss:0.5"] == pytest.approx(expected, rel=1e-5)


# Explicit


def write(path: Path, value: object) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


@pytest.fixture
def kinds() -> Table:
    return Table(tuple(Row(f"blocks.{b}.{k}", b, k, (8, n), {}) for b in range(2) for k, n in (("q", 8), ("down", 16))))


def test_explicit_blocks_are_scaled_to_the_budget(kinds: Table, tmp_path: Path) -> None:
    file = write(tmp_path / "s.json", {"blocks": [0.2, 0.6]})
    assert shares(kinds, 0.4, "explicit", file=file) == pytest.approx([0.2, 0.2, 0.6, 0.6])
    assert shares(kinds, 0.2, "explicit", file=file) == pytest.approx([0.1, 0.1, 0.3, 0.3])


def test_explicit_layers_are_kept_and_the_rest_shares_what_is_left(kinds: Table, tmp_path: Path) -> None:
    file = write(tmp_path / "s.json", {"layers": {"q": 0.2, "re:blocks\\.1\\.q": 0.0}})
    q0, down0, q1, down1 = shares(kinds, 0.5, "explicit", file=file)
    assert (q0, q1) == (0.2, 0.0)
    assert down0 == down1 == pytest.approx((0.5 * 6 - 0.2) / 4)


@pytest.mark.parametrize(
    "value, message",
    [
        ({"blocks": [0.5]}, "must list 2 sparsities"),
        ({"blocks": [0.5, 1.5]}, r"number in \[0, 1\], got 1.5"),
        ({"blocks": [0, 0]}, "all sparsities are 0"),
        ({"layers": {"k": 0.5}}, "'k' matches no layer"),
        ({"layers": {"re:(": 0.5}}, "not a regular expression"),
        ({"layers": {"q": 0.9, "down": 0.9}}, "cannot be 0.5: the nearest is 0.9"),
        ({"layers": {"q": 0.1, "down": 0.1}}, "cannot be 0.5: the nearest is 0.1"),
        ({"sparsity": 0.5}, "the file must hold"),
    ],
)
def test_explicit_plans_that_cannot_be_used_are_refused(
    kinds: Table, tmp_path: Path, value: object, message: str
) -> None:
    with pytest.raises(BillhookError, match=message):
        shares(kinds, 0.5, "explicit", file=write(tmp_path / "s.json", value))


# The mixed mapping


def test_mixed_lies_half_way_between_block_and_layer() -> None:
    alphas = [[2.0, 4.0], [3.0, 6.0]]
    rows = [Row(f"{b}.{i}", b, f"w{i}", (8, 8), {"alpha_peak": alphas[b][i]}) for b in range(2) for i in range(2)]
    q = [(a + sum(block) / 2) / 2 for block in alphas for a in block]
    raw = [(x - min(q)) / (max(q) - min(q)) * 0.6 + 0.7 for x in q]
    expected = [0.5 * r * 4 / sum(raw) for r in raw]
    assert shares(Table(tuple(rows)), 0.5, "alphapruning", mapping="mixed") == pytest.approx(expected)


# A missing column, and tables on disk


@pytest.mark.parametrize(
    "allocator, command",
    [
        ("dlp", "--metrics wanda_mean --calibration SOURCE"),
        ("lamp", "--metrics lamp_quantiles -o"),
        ("global", "--metrics magnitude_quantiles -o"),
        ("sensitivity", "--metrics block_loss:0.6 --calibration SOURCE"),
    ],
)
def test_a_missing_column_says_which_command_makes_it(allocator: str, command: str) -> None:
    with pytest.raises(BillhookError, match=f"billhook measure MODEL {command}"):
        shares(column_table("alpha_peak", [2.0, 3.0]), 0.5, allocator)


def test_curves_are_read_as_they_were_written(tmp_path: Path) -> None:
    table = measure(tiny.llama(), ["alpha_mid", "magnitude_quantiles"])
    table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == table
    assert table.columns() == ["alpha_mid", "alpha_mid_ks"]
    assert table.made_by == {"metrics": ["alpha_mid", "magnitude_quantiles"]}


@pytest.mark.parametrize("curves", [3, {"a": 3}, {"a": [1]}, {"a": [2, 1]}, {"a": [1, None]}, {"a": [1, "2"]}])
def test_malformed_curves_are_refused(tmp_path: Path, curves: object) -> None:
    row = {"layer": "w", "block": 0, "kind": "w", "shape": [8, 8], "metrics": {}, "curves": curves}
    path = write(tmp_path / "table.json", {"version": 1, "rows": [row]})
    with pytest.raises(BillhookError, match=r"row 0 \(w\)"):
        Table.load(path)
