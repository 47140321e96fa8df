"""ATP and OWL agree with plain loops and with published bounds."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tables import make_table, relaxed

from billhook.errors import BillhookError
from billhook.plan.allocators import allocate
from billhook.plan.allocators.atp import beta_grid, largest_beta
from billhook.plan.table import Row, Table

# ATP

# Blocks -> for S = 0.5, 0.6, 0.7, 0.8 the largest beta and the number of points of the published grid 0.002, 0.004,
# ....
GRID = {
    12: [(0.0909, 45), (0.0727, 36), (0.0545, 27), (0.0364, 18)],
    16: [(0.0667, 33), (0.0533, 26), (0.0400, 20), (0.0267, 13)],
    28: [(0.0370, 18), (0.0296, 14), (0.0222, 11), (0.0148, 7)],
    32: [(0.0323, 16), (0.0258, 12), (0.01935, 9), (0.0129, 6)],
    40: [(0.0256, 12), (0.0205, 10), (0.0154, 7), (0.0103, 5)],
    60: [(0.0169, 8), (0.0136, 6), (0.0102, 5), (0.0068, 3)],
    80: [(0.0127, 6), (0.0101, 5), (0.00759, 3), (0.0051, 2)],
}


@pytest.mark.parametrize("blocks", GRID)
def test_atp_has_the_published_bounds(blocks: int):
    for target, (bound, points) in zip((0.5, 0.6, 0.7, 0.8), GRID[blocks], strict=True):
        assert largest_beta(blocks, target) == pytest.approx(bound, abs=6e-5)
        assert sum(0.002 * k <= largest_beta(blocks, target) * (1 + 1e-9) for k in range(1, 100)) == points


@pytest.mark.parametrize(
    "beta, low, high",
    [(0.002, 0.669, 0.731), (0.006, 0.607, 0.793), (0.010, 0.545, 0.855), (0.012, 0.514, 0.886), (0.018, 0.421, 0.979)],
)
def test_atp_gives_the_published_progressions(beta: float, low: float, high: float):
    table = make_table([[(8, 8), (8, 24)]] * 32, lambda *_: 1.0)
    values = list(allocate(table, 0.7, allocator="atp", beta=beta).sparsity.values())
    assert values[::2] == values[1::2] == pytest.approx([0.7 - beta * 31 / 2 + beta * i for i in range(32)], abs=1e-12)
    assert (values[0], values[-1]) == pytest.approx((low, high), abs=1e-9)


def test_atp_restores_the_budget_where_blocks_differ():
    table = make_table([[(8, 8)], [(8, 8)], [(80, 80)]], lambda *_: 1.0)
    values = list(allocate(table, 0.5, allocator="atp", beta=0.1).sparsity.values())
    assert [b - a for a, b in pairwise(values)] == pytest.approx([0.1, 0.1])
    assert values[1] < 0.5


@pytest.mark.parametrize("beta", [-0.001, 0.0194, 1])
def test_atp_prints_the_legal_range(beta: float):
    table = make_table([[(8, 8)]] * 32, lambda *_: 1.0)
    with pytest.raises(
        BillhookError, match=r"ATP's beta must be in \[0, 0\.0193548\] for 32 blocks at sparsity 0.7, got "
    ):
        allocate(table, 0.7, allocator="atp", beta=beta)


def test_atp_uses_a_quarter_of_its_largest_beta() -> None:
    """Of five blocks at 60 %, the largest is 2 x 0.4 / 4."""
    table = Table(tuple(Row(f"blocks.{i}.w", i, "w", (8, 8)) for i in range(5)))
    sparsity = allocate(table, 0.6, allocator="atp").sparsity
    assert list(sparsity.values()) == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7], abs=1e-12)
    assert beta_grid(5, 0.99) == [0.002, 0.004]


# OWL


def owl_by_hand(table: Table, target: float, lam: float, m: float) -> list[float]:
    """OWL's formula in plain loops, without the published floor of 0.01."""
    ratios = [rows[0].metrics[f"outlier_ratio:{m:g}"] for rows in table.blocks().values()]
    low, high = min(ratios), max(ratios)
    r = [(d - low) / (high - low) * 2 * lam for d in ratios]
    average = sum(r) / len(r)
    by_block = [1 - (x - average + (1 - target)) for x in r]
    return [by_block[row.block] for row in table]


@relaxed
@given(
    ratios=st.lists(st.floats(0, 10), min_size=2, max_size=12, unique=True),
    target=st.floats(0.3, 0.7),
    lam=st.floats(0, 0.15),
)
def test_owl_is_the_published_window_where_that_is_legal(ratios: list[float], target: float, lam: float):
    assume(max(ratios) - min(ratios) > 1e-6)
    table = make_table([[(8, 8), (16, 8)]] * len(ratios), lambda column, block, layer: ratios[block])
    plan = allocate(table, target, allocator="owl", lam=lam)
    assert list(plan.sparsity.values()) == pytest.approx(owl_by_hand(table, target, lam, 5), abs=1e-9)


def test_owl_clips_and_reads_the_column_of_its_m():
    table = Table(
        tuple(
            Row(f"b{i}", i, "w", (8, 8), {"outlier_ratio:7": float(i), "outlier_ratio:5": -float(i)}) for i in range(3)
        )
    )
    assert list(allocate(table, 0.1, allocator="owl", lam=0.5, m=7).sparsity.values()) == pytest.approx([0.3, 0, 0])
    assert list(allocate(table, 0.1, allocator="owl", lam=0.5).sparsity.values()) == pytest.approx([0, 0, 0.3])
    with pytest.raises(BillhookError, match=r"lam must be in \[0, 0.5\]"):
        allocate(table, 0.5, allocator="owl", lam=0.6)
