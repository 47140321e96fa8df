"""Every registered allocator keeps the contract."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import NAMES, PATTERNS, TARGETS, VALUES, columns, make_table, relaxed, tables, total

from billhook.errors import BillhookError
from billhook.plan.allocators import ALLOCATORS, allocate
from billhook.plan.spec import Pattern
from billhook.plan.table import Row, Table


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
    assert list(allocate(table, target, allocator=name).sparsity.values()) == pytest.approx(
        [target] * len(table.rows), abs=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(table=tables())
def test_sparsity_zero_removes_nothing_in_any_layer(name: str, table: Table):
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
        table := make_table(shapes, lambda column, block, layer: 2.0 + block + layer / 7),
        None,
        allocator="owl",
        pattern=pattern,
    )
    assert abs(total(table, plan.sparsity) - plan.target * table.total) <= 64 / of


@pytest.mark.parametrize("name", NAMES)
def test_options_are_checked_and_listed(name: str):
    table = make_table([[(8, 8)]] * 2, lambda column, block, layer: 2.0 + block)
    with pytest.raises(BillhookError, match=rf"allocator '{name}' has no option 'nonsense'.*Its options: "):
        allocate(table, 0.5, allocator=name, nonsense=1)
    for option in ALLOCATORS.options(name).values():
        with pytest.raises(BillhookError, match=rf"{option.name}|never a value"):
            allocate(table, 0.5, allocator=name, **{option.name: "never a value"})


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_paper_and_a_docstring(name: str):
    assert ALLOCATORS.paper(name)
    assert ALLOCATORS.get(name).__doc__
    assert allocate(make_table([[(8, 8)]], lambda *_: 1.0), 0.5, allocator=name).made_by["paper"] == ALLOCATORS.paper(
        name
    )


@pytest.mark.parametrize("name", [name for name in NAMES if columns(name)])
def test_a_missing_column_says_how_to_measure_it(name: str):
    table = Table((Row("w", 0, "w", (8, 8), {"other": 1.0}),))
    with pytest.raises(
        BillhookError, match=f"no column '{columns(name)[0]}'.*billhook measure MODEL --metrics {columns(name)[0]}"
    ):
        allocate(table, 0.5, allocator=name)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, 50, math.nan, math.inf, "0.5", None, True])
def test_impossible_sparsities_are_refused(sparsity):
    with pytest.raises(BillhookError, match=r"[Ss]parsity"):
        allocate(make_table([[(8, 8)]], lambda *_: 1.0), sparsity)


def test_a_pattern_determines_its_sparsity():
    table = make_table([[(8, 8)]] * 3, lambda *_: 1.0)
    assert allocate(table, 0.5, pattern="2:4").target == allocate(table, None, pattern=Pattern(2, 4)).target == 0.5
    with pytest.raises(BillhookError, match=r"keeps 2 of every 4: its sparsity is 0.5, not 0.6"):
        allocate(table, 0.6, pattern="2:4")


def test_defaults_are_the_published_ones() -> None:
    """Those of `global`, `sensitivity` and `curves` are ours."""
    assert {name: ALLOCATORS.configure(name, {}) for name in set(ALLOCATORS._built_in) - {"explicit"}} == {
        "uniform": {},
        "alphapruning": {"metric": "alpha_peak", "epsilon": 0.3, "mapping": "block"},
        "atp": {"beta": None},
        "owl": {"lam": 0.08, "m": 5.0},
        "dlp": {"alpha": 0.15, "statistic": "mean"},
        "er": {},
        "lamp": {},
        "global": {"score": "magnitude", "floor": 0.1},
        "sensitivity": {"epsilon": 0.2, "trial": 0.6},
        "curves": {"criterion": "admm", "strength": 1.0},
    }
