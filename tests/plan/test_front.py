"""The front that a plan holds."""

import itertools
import math
from dataclasses import replace

import pytest
from levels_of import make_levels

from billhook.errors import BillhookError
from billhook.plan.front import front
from billhook.plan.level_allocators import allocate_levels
from billhook.plan.levels import types_of
from billhook.plan.plan import Plan


def test_the_front_falls_holds_the_chosen_point_and_lies_below_one_type_everywhere():
    levels = make_levels([[(8, 256), (4, 32)], [(16, 512)]], [(16, 256)], tie=True)
    plan = Plan.from_json(allocate_levels(levels).to_json(), "plan")  # as it is read from a file
    found, types = front(plan), types_of(plan)
    assert found.chosen == (levels.total(types), pytest.approx(levels.predicted(types)))
    assert all(a <= c and b >= d for (a, b), (c, d) in itertools.pairwise(found.best))
    for budget in {size for size, _ in found.best}:
        optimum = types_of(allocate_levels(replace(levels, budget=budget)))
        assert min(loss for size, loss in found.best if size <= budget) == pytest.approx(levels.predicted(optimum))
    wanted = ("q3_k", "q2_k")
    sizes = [sum(levels.bytes(g, t if t in levels.menu(g) else "iq4_nl") for g in levels.groups) for t in wanted]
    assert [found.uniform[t][0] for t in wanted] == sizes
    for size, loss in found.uniform.values():
        optimum = types_of(allocate_levels(replace(levels, budget=size)))
        assert loss >= levels.predicted(optimum) * (1 - 1e-12)
    assert math.isfinite(sum(loss for _, loss in found.best))


def test_plans_without_levels_and_edited_ones_are_refused():
    levels = make_levels([[(8, 256)], [(16, 256)]])
    with pytest.raises(BillhookError, match="holds no levels"):
        front(allocate_levels(replace(levels, errors={}), "uniform"))
    value = allocate_levels(levels).to_json()
    for change, match in (
        ({"weights": dict.fromkeys(value["weights"], "f16")}, "it was edited"),
        ({"made_by": value["made_by"] | {"levels": {"blocks.0.w0": {"weight": 1.0}}}}, "made_by.levels"),
    ):
        with pytest.raises(BillhookError, match=match):
            front(Plan.from_json(value | change, "plan"))
