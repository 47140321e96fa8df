"""Every registered allocator of levels keeps the contract."""

from dataclasses import replace

import pytest
from hypothesis import given
from levels_of import COLUMNS, NAMES, levels, make_levels
from tables import relaxed

from billhook.errors import BillhookError
from billhook.methods.quantize import QUANTIZERS
from billhook.plan.level_allocators import LEVEL_ALLOCATORS, allocate_levels
from billhook.plan.levels import Levels, types_of
from billhook.plan.storage import bits
from billhook.plan.table import Row, Table
from billhook.racing.allocators import MODEL_ALLOCATORS


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(levels=levels())
def test_the_budget_is_spent_and_never_exceeded(name: str, levels: Levels):
    """What is left is less than any tensor's next type costs."""
    types = types_of(allocate_levels(levels, name))
    assert set(types) == set(levels.shapes)
    assert all(types[tensor] in menu for tensor, menu in levels.menus.items())
    assert all(len({types[tensor] for tensor in group}) == 1 for group in levels.groups)
    left = levels.budget - levels.total(types)
    assert left >= 0
    for group in levels.groups:
        now = types[group[0]]
        larger = [t for t in levels.menu(group) if bits(t) > bits(now)]
        assert all(levels.bytes(group, t) - levels.bytes(group, now) > left for t in larger)
    assert types == types_of(allocate_levels(levels, name))


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_and_the_largest_budget_leave_no_choice(name: str):
    shapes = [[(8, 256), (4, 32)], [(8, 512)]]
    for share, chosen in ((0.0, min), (1.0, max)):
        levels = make_levels(shapes, [(16, 256)], share)
        types = types_of(allocate_levels(levels, name))
        assert {t: bits(x) for t, x in types.items()} == {t: chosen(map(bits, m)) for t, m in levels.menus.items()}
    with pytest.raises(BillhookError, match=r"The least possible is [\d,]+ bytes, and 10 were asked for"):
        allocate_levels(replace(levels, budget=10), name)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_checked_and_listed(name: str):
    levels = make_levels([[(8, 256)]] * 2)
    with pytest.raises(BillhookError, match=rf"level allocator '{name}' has no option 'nonsense'.*Its options: "):
        allocate_levels(levels, name, nonsense=1)
    for option in LEVEL_ALLOCATORS.options(name).values():
        with pytest.raises(BillhookError, match=rf"{option.name}|never a value"):
            allocate_levels(levels, name, **{option.name: "never a value"})


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_says_how_it_was_made(name: str):
    levels = make_levels([[(8, 256)]] * 2, [(8, 32)], value=lambda column, block, layer: 2.0 + block)
    made_by = allocate_levels(levels, name).made_by
    assert made_by["allocator"] == name
    assert made_by["options"] == LEVEL_ALLOCATORS.configure(name, {})
    assert made_by["paper"] == LEVEL_ALLOCATORS.paper(name)
    assert set(made_by.get("metrics", {})) <= set(COLUMNS)
    assert LEVEL_ALLOCATORS.get(name).__doc__


def columns(name: str) -> list[str]:
    return [c for c in LEVEL_ALLOCATORS.needs(name, LEVEL_ALLOCATORS.configure(name, {})) if c in COLUMNS]


@pytest.mark.parametrize("name", [name for name in NAMES if columns(name)])
def test_a_missing_column_says_how_to_measure_it(name: str):
    levels = make_levels([[(8, 256)]] * 2)
    table = Table(tuple(Row(r.layer, r.block, r.kind, r.shape, {"other": 1.0}) for r in levels.table))
    with pytest.raises(BillhookError, match=f"no column '{columns(name)[0]}'.*billhook measure MODEL --metrics"):
        allocate_levels(replace(levels, table=table), name)


def test_an_unknown_allocator_is_named_with_the_nearest():
    with pytest.raises(BillhookError, match=r"Unknown level allocator 'curvs'. Did you mean 'curves'\?"):
        allocate_levels(make_levels([[(8, 256)]]), "curvs")


def test_no_option_of_an_allocator_has_the_name_of_a_quantizers_option():
    """`--set` of compress gives options to both."""
    allocators = [(r, name) for r in (LEVEL_ALLOCATORS, MODEL_ALLOCATORS) for name in r.names()]
    taken = {option for name in QUANTIZERS.names() for option in QUANTIZERS.options(name)}
    assert not taken & {option for registry, name in allocators for option in registry.options(name)}
