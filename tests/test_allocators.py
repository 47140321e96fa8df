"""Every registered allocator keeps the contract; the published ones agree with plain loops and with published numbers."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.allocators import ALLOCATORS, allocate
from billhook.allocators.atp import largest_beta
from billhook.errors import BillhookError
from billhook.metrics import CURVES, FACTS, canonical, sign
from billhook.plan import Pattern
from billhook.table import Row, Table

relaxed = settings(deadline=None, max_examples=25)  # no time limit for one example: machines are shared
NAMES = ALLOCATORS.names()
PATTERNS = ("2:4", "1:4", "4:8", "3:8", "5:8")
TARGETS = st.one_of(st.sampled_from([0.0, 0.01, 0.5, 0.7, 0.99, 1 - 1e-12]), st.floats(0, 1, exclude_max=True))
VALUES = st.one_of(st.floats(1.2, 8.0), st.sampled_from([0.0, 2.0]), st.floats(-1e299, 1e299))


def columns(name: str) -> tuple[str, ...]:
    """The table columns that an allocator reads with its default options."""
    return ALLOCATORS.needs(name, ALLOCATORS.configure(name, {}))


ALL_COLUMNS = sorted({column for name in NAMES for column in columns(name)})


def make_table(shapes: list[list[tuple[int, int]]], value) -> Table:
    """A table from the shapes of each block's layers; `value(column, block, layer)` gives the metrics, and the points of curves."""
    rows = []
    for b, block in enumerate(shapes):
        for i, shape in enumerate(block):
            metrics = {column: value(column, b, i) for column in ALL_COLUMNS if column.partition(":")[0] not in CURVES}
            of_curves = [column for column in ALL_COLUMNS if column not in metrics]
            curves = {column: tuple(sorted(value(column, b, i) for _ in range(5))) for column in of_curves}
            rows.append(Row(f"blocks.{b}.w{i}", b, f"w{i}", shape, metrics, curves))
    return Table(tuple(rows))


@st.composite
def tables(draw, values=VALUES, equal: bool = False) -> Table:
    """Up to eight blocks of up to four layers of unlike sizes; metrics anything that a table file may hold."""
    size = st.integers(1, 64).map(lambda n: 8 * n)
    shapes = draw(st.lists(st.lists(st.tuples(size, size), min_size=1, max_size=4), min_size=1, max_size=8))
    same = draw(values)
    return make_table(shapes, lambda column, block, layer: same if equal else draw(values))


def total(table: Table, sparsity: dict[str, float]) -> float:
    return math.fsum(sparsity[row.layer] * row.n for row in table)


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(table=tables(), target=TARGETS)
def test_the_budget_is_met_exactly(name: str, table: Table, target: float):
    plan = allocate(table, target, allocator=name)
    assert list(plan.sparsity) == [row.layer for row in table]
    assert all(0 <= s <= 1 for s in plan.sparsity.values())
    assert total(table, plan.sparsity) == pytest.approx(target * table.total, rel=1e-9, abs=1e-9 * table.total)
    assert sum(plan.zeros(table.shapes).values()) == round(total(table, plan.sparsity))
    assert plan.sparsity == allocate(table, target, allocator=name).sparsity


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"atp", "er"}))  # ATP looks at depth, ER at shapes, not at metrics
@relaxed
@given(table=tables(equal=True), target=TARGETS)
def test_equal_metrics_give_the_uniform_plan(name: str, table: Table, target: float):
    assert list(allocate(table, target, allocator=name).sparsity.values()) == pytest.approx([target] * len(table.rows), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(table=tables())
def test_no_sparsity_is_none_anywhere(name: str, table: Table):
    assert set(allocate(table, 0, allocator=name).sparsity.values()) == {0.0}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"er"}))
@relaxed
@given(value=VALUES, target=TARGETS)
def test_one_block_is_uniform(name: str, value: float, target: float):
    table = make_table([[(8, 16), (24, 8)]], lambda column, block, layer: value)
    assert list(allocate(table, target, allocator=name).sparsity.values()) == pytest.approx([target] * 2, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(table=tables(), pattern=st.sampled_from(PATTERNS))
def test_patterns_give_whole_groups_rounded_from_the_unstructured_plan(name: str, table: Table, pattern: str):
    parsed = Pattern.parse(pattern)
    assert parsed.keep is not None
    assert parsed.of is not None
    plan = allocate(table, None, allocator=name, pattern=pattern)
    assert plan.target == 1 - parsed.keep / parsed.of
    assert all((s * parsed.of).is_integer() and 0 <= s <= 1 for s in plan.sparsity.values())
    smooth = allocate(table, plan.target, allocator=name).sparsity
    assert all(abs(plan.sparsity[layer] - s) < (1 + 1e-6) / parsed.of for layer, s in smooth.items())
    # The budget is missed by less than a layer that was rounded could mend by being rounded the other way.
    over = total(table, plan.sparsity) - plan.target * table.total
    for row in table:
        step = math.copysign(row.n / parsed.of, -over)
        other_way = (plan.sparsity[row.layer] - smooth[row.layer]) * step < -1e-6 * row.n
        assert abs(over + step) >= abs(over) * (1 - 1e-6) or not other_way


@relaxed
@given(sizes=st.lists(st.integers(1, 3), min_size=4, max_size=40), pattern=st.sampled_from(PATTERNS))
def test_patterns_miss_the_budget_by_less_than_the_smallest_step(sizes: list[int], pattern: str):
    of = Pattern.parse(pattern).of
    assert of is not None
    shapes = [[(8, 8)] * 2 + [(8, 8 * size)] for size in sizes]
    plan = allocate(
        table := make_table(shapes, lambda column, block, layer: 2.0 + block + layer / 7), None, allocator="owl", pattern=pattern
    )
    assert abs(total(table, plan.sparsity) - plan.target * table.total) <= 64 / of


@pytest.mark.parametrize("name", NAMES)
def test_options_are_checked_and_listed(name: str):
    table = make_table([[(8, 8)]] * 2, lambda column, block, layer: 2.0 + block)
    with pytest.raises(BillhookError, match=rf"allocator '{name}' has no option 'nonsense'.*Its options: "):
        allocate(table, 0.5, allocator=name, nonsense=1)
    for option in ALLOCATORS.options(name).values():
        with pytest.raises(BillhookError, match=option.name):
            allocate(table, 0.5, allocator=name, **{option.name: "never a value"})


@pytest.mark.parametrize("name", NAMES)
def test_methods_say_where_they_come_from_and_what_they_do(name: str):
    assert ALLOCATORS.paper(name)
    assert ALLOCATORS.get(name).__doc__
    assert allocate(make_table([[(8, 8)]], lambda *_: 1.0), 0.5, allocator=name).made_by["paper"] == ALLOCATORS.paper(name)


@pytest.mark.parametrize("name", [name for name in NAMES if columns(name)])
def test_a_missing_column_says_how_to_measure_it(name: str):
    table = Table((Row("w", 0, "w", (8, 8), {"other": 1.0}),))
    with pytest.raises(BillhookError, match=f"no column '{columns(name)[0]}'.*billhook measure MODEL --metrics {columns(name)[0]}"):
        allocate(table, 0.5, allocator=name)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, 50, math.nan, math.inf, "0.5", None, True])
def test_impossible_sparsities(sparsity):
    with pytest.raises(BillhookError, match=r"[Ss]parsity"):
        allocate(make_table([[(8, 8)]], lambda *_: 1.0), sparsity)


def test_a_pattern_is_its_own_sparsity():
    table = make_table([[(8, 8)]] * 3, lambda *_: 1.0)
    assert allocate(table, 0.5, pattern="2:4").target == allocate(table, None, pattern=Pattern(2, 4)).target == 0.5
    with pytest.raises(BillhookError, match=r"keeps 2 of every 4: its sparsity is 0.5, not 0.6"):
        allocate(table, 0.6, pattern="2:4")


# AlphaPruning


def alphapruning_by_hand(table: Table, target: float, metric: str, epsilon: float, mapping: str, clip: bool = True) -> list[float]:
    """AlphaPruning in plain loops; the factor is found by giving what clipped layers cannot take to the others."""
    q = []
    for row in table:
        mates = [x.metrics[metric] for x in table if x.block == row.block] if mapping == "block" else [row.metrics[metric]]
        q.append(sign(metric) * sum(mates) / len(mates))
    r = [(x - min(q)) / (max(q) - min(q)) * 2 * epsilon + (1 - epsilon) for x in q]
    n = [row.n for row in table]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(r)) if i not in full]
        left = target * sum(n) - sum(n[i] for i in full)
        factor = left / sum(n[i] * r[i] for i in rest)
        more = {i for i in rest if clip and factor * r[i] > 1}
        if not more:
            return [1.0 if i in full else factor * r[i] for i in range(len(r))]
        full |= more


@relaxed
@given(
    table=tables(values=st.floats(1.2, 8.0)),
    target=st.floats(0.01, 0.99),
    epsilon=st.floats(0, 0.99),
    mapping=st.sampled_from(["block", "layer"]),
)
def test_alphapruning_is_the_published_map_clipped_with_its_budget_restored(table: Table, target: float, epsilon: float, mapping: str):
    plan = allocate(table, target, allocator="alphapruning", epsilon=epsilon, mapping=mapping)
    alphas = [row.metrics["alpha_peak"] for row in table]
    if len(set(alphas)) > 1 and (mapping == "layer" or len(table.blocks()) > 1):
        expected = alphapruning_by_hand(table, target, "alpha_peak", epsilon, mapping)
        assert list(plan.sparsity.values()) == pytest.approx(expected, abs=1e-8)


def test_alphapruning_reaches_its_limits():
    table = make_table([[(8, 8)]] * 5, lambda column, block, layer: 1.5 + block)
    assert list(allocate(table, 0.5, allocator="alphapruning", epsilon=0).sparsity.values()) == pytest.approx([0.5] * 5)
    gentle = list(allocate(table, 0.5, allocator="alphapruning", epsilon=0.3).sparsity.values())
    assert max(gentle) / min(gentle) == pytest.approx(1.3 / 0.7)
    extreme = list(allocate(table, 0.9, allocator="alphapruning", epsilon=1).sparsity.values())
    assert extreme == pytest.approx([0.5, 1, 1, 1, 1], abs=1e-9)
    for epsilon in (-0.1, 1.1):
        with pytest.raises(BillhookError, match=r"epsilon must be in \[0, 1\]"):
            allocate(table, 0.5, allocator="alphapruning", epsilon=epsilon)


def test_alphapruning_maps_layers_one_by_one_when_asked():
    table = make_table([[(8, 8), (8, 8)], [(8, 8), (8, 8)]], lambda column, block, layer: 2.0 + block + 2 * layer)
    by_block = list(allocate(table, 0.5, allocator="alphapruning").sparsity.values())
    by_layer = list(allocate(table, 0.5, allocator="alphapruning", mapping="layer").sparsity.values())
    assert by_block[0] == by_block[1] < by_block[2] == by_block[3]
    assert by_layer[0] < by_layer[2] < by_layer[1] < by_layer[3]


def test_a_larger_alpha_means_more_sparsity():
    table = make_table([[(8, 8)]] * 2, lambda column, block, layer: [4.0, 2.0][block])
    light, heavy = allocate(table, 0.5, allocator="alphapruning").sparsity.values()
    assert light > heavy


@pytest.mark.parametrize("metric", FACTS)
def test_each_metric_has_its_direction(metric: str):
    column = canonical(metric)
    table = Table(tuple(Row(f"b{i}", i, "w", (8, 8), {column: 1.0 + i}) for i in range(2)))
    small, large = allocate(table, 0.5, allocator="alphapruning", metric=column).sparsity.values()
    assert (large > small) == (FACTS[metric].sign == 1)


def test_an_unknown_metric_is_named():
    table = make_table([[(8, 8)]], lambda *_: 1.0)
    with pytest.raises(BillhookError, match=r"alpha_peek.*alpha_peak"):
        allocate(table, 0.5, allocator="alphapruning", metric="alpha_peek")


# Blocks of the published alpha_peak (METHODS A.1) and the layer sparsities that follow from them at 0.7 (A.3): block -> (epsilon .2, .3).
LLAMA_7B = {0: (0.5704, 0.5042), 9: (0.5680, 0.5006), 17: (0.7156, 0.7236), 25: (0.8521, 0.9297), 31: (0.7317, 0.7479)}
LLAMA_2_7B = {0: (0.5381, 0.4619), 2: (0.6590, 0.6397), 16: (0.6977, 0.6965), 20: (0.8072, 0.8578), 31: (0.7031, 0.7046)}


def published(shared: Path, model: str) -> Table:
    """The published alphas of a model as a table. Sizes are those of LLaMA-7B; all blocks are of one size, so no other matters."""
    shapes = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
    rows = []
    for name, alpha in json.loads((shared / "golden" / "llama_alpha_peak.json").read_text())["alpha_peak"][model].items():
        _, _, block, *kind = name.split(".")
        rows.append(Row(name, int(block), ".".join(kind), shapes.get(kind[-1], (4096, 4096)), {"alpha_peak": alpha}))
    return Table(tuple(rows))


@pytest.mark.parametrize("model, expected", [("llama-7b-hf", LLAMA_7B), ("llama2-7b-hf", LLAMA_2_7B)])
def test_published_alphas_give_the_published_sparsities(shared: Path, model: str, expected: dict[int, tuple[float, float]]):
    table = published(shared, model)
    for position, epsilon in enumerate((0.2, 0.3)):
        sparsity = allocate(table, 0.7, allocator="alphapruning", epsilon=epsilon).sparsity
        for block, values in expected.items():
            for row in table.blocks()[block]:
                assert sparsity[row.layer] == pytest.approx(values[position], abs=6e-5)


@pytest.mark.parametrize(
    "model, target, epsilon, above",
    [("llama-7b-hf", 0.8, 0.3, 6), ("llama-7b-hf", 0.7, 0.5, 6), ("llama2-7b-hf", 0.8, 0.4, 4), ("llama2-70b-hf", 0.8, 0.5, 5)],
)
def test_published_sparsities_above_one_are_clipped(shared: Path, model: str, target: float, epsilon: float, above: int):
    table = published(shared, model)
    unclipped = alphapruning_by_hand(table, target, "alpha_peak", epsilon, "block", clip=False)
    assert len({row.block for row, s in zip(table, unclipped, strict=True) if s > 1}) == above
    sparsity = allocate(table, target, allocator="alphapruning", epsilon=epsilon).sparsity
    assert max(sparsity.values()) <= 1
    assert total(table, sparsity) == pytest.approx(target * table.total, rel=1e-12)
    assert list(sparsity.values()) == pytest.approx(alphapruning_by_hand(table, target, "alpha_peak", epsilon, "block"), abs=1e-9)


# ATP

# Blocks -> for S = 0.5, 0.6, 0.7, 0.8 the largest beta and the number of points of the published grid 0.002, 0.004, ....
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
    with pytest.raises(BillhookError, match=r"ATP's beta must be in \[0, 0\.0193548\] for 32 blocks at sparsity 0.7, got "):
        allocate(table, 0.7, allocator="atp", beta=beta)


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
@given(ratios=st.lists(st.floats(0, 10), min_size=2, max_size=12, unique=True), target=st.floats(0.3, 0.7), lam=st.floats(0, 0.15))
def test_owl_is_the_published_window_where_that_is_legal(ratios: list[float], target: float, lam: float):
    if max(ratios) - min(ratios) < 1e-6:
        return
    table = make_table([[(8, 8), (16, 8)]] * len(ratios), lambda column, block, layer: ratios[block])
    plan = allocate(table, target, allocator="owl", lam=lam)
    assert list(plan.sparsity.values()) == pytest.approx(owl_by_hand(table, target, lam, 5), abs=1e-9)


def test_owl_clips_and_reads_the_column_of_its_m():
    table = Table(tuple(Row(f"b{i}", i, "w", (8, 8), {"outlier_ratio:7": float(i), "outlier_ratio:5": -float(i)}) for i in range(3)))
    assert list(allocate(table, 0.1, allocator="owl", lam=0.5, m=7).sparsity.values()) == pytest.approx([0.3, 0, 0])
    assert list(allocate(table, 0.1, allocator="owl", lam=0.5).sparsity.values()) == pytest.approx([0, 0, 0.3])
    with pytest.raises(BillhookError, match=r"lam must be in \[0, 0.5\]"):
        allocate(table, 0.5, allocator="owl", lam=0.6)
