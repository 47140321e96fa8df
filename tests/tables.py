"""Tables for the tests of allocators: every column that one of them reads, with any values; and any json."""

import math
from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from billhook.errors import BillhookError
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.metrics import CURVES
from billhook.plan.table import Row, Table

# no time limits: machines are shared
relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
NAMES = ALLOCATORS.names()
PATTERNS = ("2:4", "1:4", "4:8", "3:8", "5:8")
TARGETS = st.one_of(st.sampled_from([0.0, 0.01, 0.5, 0.7, 0.99, 1 - 1e-12]), st.floats(0, 1, exclude_max=True))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, 1e308, -1, 0, True, "nan"]))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
VALUES = st.one_of(st.floats(1.2, 8.0), st.sampled_from([0.0, 2.0]), st.floats(-1e299, 1e299))


def columns(name: str) -> tuple[str, ...]:
    """The table columns that an allocator reads with its default options."""
    return ALLOCATORS.needs(name, ALLOCATORS.configure(name, {}))


ALL_COLUMNS = sorted({column for name in NAMES for column in columns(name)})


def make_table(shapes: list[list[tuple[int, int]]], value) -> Table:
    """A table from the shapes of each block's layers; `value(column, block, layer)` gives the metrics, and the points
    of curves."""
    rows = []
    for b, block in enumerate(shapes):
        for i, shape in enumerate(block):
            metrics = {column: value(column, b, i) for column in ALL_COLUMNS if column.partition(":")[0] not in CURVES}
            of_curves = [column for column in ALL_COLUMNS if column not in metrics]
            curves = {column: tuple(sorted(value(column, b, i) for _ in range(5))) for column in of_curves}
            rows.append(Row(f"blocks.{b}.w{i}", b, f"w{i}", shape, metrics, curves))
    return Table(tuple(rows))


def short(error: BillhookError) -> None:
    """One line, no longer than a person reads."""
    assert "\n" not in str(error)
    assert len(str(error)) < 400


@st.composite
def tables(draw, values=VALUES, equal: bool = False, drawn: str | None = None) -> Table:
    """Up to eight blocks of up to four layers of unlike sizes; metrics anything that a table file may hold.

    The column `drawn` has values of its own; those of the others are shared by some cells, because drawing one for each
    takes long.
    """
    size = st.integers(1, 64).map(lambda n: 8 * n)
    shapes = draw(st.lists(st.lists(st.tuples(size, size), min_size=1, max_size=4), min_size=1, max_size=8))
    pool = draw(st.lists(values, min_size=1, max_size=1 if equal else 40))
    chance = Random(draw(st.integers(0, 2**32)))
    return make_table(shapes, lambda column, block, layer: draw(values) if column == drawn else chance.choice(pool))


def total(table: Table, sparsity: dict[str, float]) -> float:
    return math.fsum(sparsity[row.layer] * row.n for row in table)
