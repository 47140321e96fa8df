"""Levels for the tests of their allocators: tensors of unlike sizes, some tied, with any budget that can be met."""

from random import Random

from hypothesis import strategies as st

from billhook.plan.level_allocators import LEVEL_ALLOCATORS
from billhook.plan.levels import Levels
from billhook.plan.metrics import FACTS
from billhook.plan.storage import bits, block
from billhook.plan.table import Row, Table

NAMES = LEVEL_ALLOCATORS.names()
TYPES = ("iq2_xxs", "q2_k", "q3_k", "iq3_s", "q4_k", "iq4_nl", "q5_0", "q8_0")
COLUMNS = sorted(
    {
        column
        for name in NAMES
        for column in LEVEL_ALLOCATORS.needs(name, LEVEL_ALLOCATORS.configure(name, {}))
        if column.partition(":")[0] in FACTS
    }
)


def make_levels(blocks, outside=(), share=0.5, tie=False, value=lambda column, block, layer: 2.0, error=None) -> Levels:
    """Levels of the shapes of each block's layers; `share` says where the budget is between the smallest and the
    largest, `value(column, block, layer)` gives the metrics."""
    rows, shapes = [], {}
    for b, layers in enumerate(blocks):
        for i, shape in enumerate(layers):
            name = f"blocks.{b}.w{i}"
            rows.append(Row(name, b, f"w{i}", shape, {column: value(column, b, i) for column in COLUMNS}))
            shapes[name] = shape
    extra = {f"extra.{k}": shape for k, shape in enumerate(outside)}
    shapes |= extra
    menus = {name: [t for t in TYPES if shape[1] % block(t) == 0] for name, shape in shapes.items()}
    tied = [tuple(f"blocks.{b}.w{i}" for i in (0, 1)) for b, x in enumerate(blocks) if tie and len(x) > 1]
    error = error or (lambda name, bits: 4**-bits)
    errors = {name: {t: error(name, bits(t)) for t in menu} for name, menu in menus.items()}
    weights = dict.fromkeys((row.layer for row in rows), 1.0)
    levels = Levels(shapes, menus, 1, list(extra), tied, errors, weights, Table(tuple(rows)))
    least, most = (sum(levels.bytes(g, levels.menu(g)[k]) for g in levels.groups) for k in (0, -1))
    return Levels(shapes, menus, int(least + share * (most - least)), *list(vars(levels).values())[3:8])


@st.composite
def levels(draw, equal: bool = False) -> Levels:
    """Up to six blocks of up to four layers, embeddings and head, tied or not, with any values in the columns."""
    size = st.tuples(st.integers(1, 40), st.sampled_from([32, 256, 512]))
    blocks = draw(st.lists(st.lists(size, min_size=1, max_size=4), min_size=1, max_size=6))
    outside = draw(st.lists(size, max_size=2))
    pool = draw(st.lists(st.floats(1.0, 8.0) | st.just(0.01), min_size=1, max_size=1 if equal else 20))
    chance = Random(draw(st.integers(0, 2**32)))
    scale = {name: chance.uniform(0.1, 10) for name in map(str, range(6))}
    return make_levels(
        blocks,
        outside,
        draw(st.floats(0, 1.1)),
        draw(st.booleans()),
        lambda column, block, layer: chance.choice(pool),
        lambda name, bits: 4**-bits * scale.get(name[-1], 1.0) * (1 + len(name)),
    )
