"""The published forms against their formulas, in plain loops."""

import itertools
import statistics
from dataclasses import replace

import pytest
from levels_of import make_levels

from billhook.errors import BillhookError
from billhook.plan.level_allocators import allocate_levels
from billhook.plan.levels import types_of
from billhook.plan.storage import bits

TWELVE = [[(32, 256), (8, 256)]] * 12


def bits_of(levels, name, **options) -> list[float]:
    """The mean bits of each block's layers."""
    types = types_of(allocate_levels(levels, name, **options))
    found = []
    for rows in levels.table.blocks().values():
        sizes = [levels.bytes([row.layer], types[row.layer]) for row in rows]
        found.append(8 * sum(sizes) / sum(row.n for row in rows))
    return found


def falling(values) -> bool:
    """Up to the one block in which a step of the budget ends."""
    return sum(a < b - 1e-9 for a, b in itertools.pairwise(values)) <= 1 and values[0] > values[-1]


@pytest.mark.parametrize(
    ("name", "column"), [("alphapruning", "alpha_peak"), ("alphaq", "alpha_farms"), ("dlp", "wanda_mean")]
)
def test_blocks_with_larger_values_keep_fewer_bits(name: str, column: str):
    levels = make_levels(TWELVE, value=lambda c, block, layer: 2.0 + block / 4 if c == column else 1.0)
    assert falling(bits_of(levels, name))


def test_blocks_with_more_outliers_keep_more_bits():
    levels = make_levels(TWELVE, value=lambda c, block, layer: 0.5 + block if c == "outlier_ratio:5" else 1.0)
    assert falling(bits_of(levels, "owl")[::-1])


def test_a_metric_of_the_other_sign_is_mapped_the_other_way_round():
    levels = make_levels(TWELVE, value=lambda c, block, layer: 2.0 + block / 4)
    assert falling(bits_of(levels, "alphapruning", metric="frobenius_sq")[::-1])


@pytest.mark.parametrize(
    ("name", "options"),
    [("alphapruning", {"epsilon": 0}), ("atp", {"beta": 0}), ("owl", {"lam": 0}), ("dlp", {"alpha": 0})],
)
def test_a_window_of_no_width_gives_bits_as_even_as_types_allow(name: str, options):
    levels = make_levels(TWELVE, value=lambda c, block, layer: 2.0 + block)
    types = types_of(allocate_levels(levels, name, **options)).values()
    ladder = [bits(t) for _, t in levels.ladder(["blocks.0.w0"])]
    assert len(set(types)) <= 2
    places = sorted(ladder.index(bits(t)) for t in set(types))
    assert places[-1] - places[0] <= 1


def test_the_bits_of_atp_are_the_progression_rounded_to_types():
    levels = make_levels([[(32, 256)]] * 12, share=0.4)
    least, most = (bits(levels.ladder(["blocks.0.w0"])[k][1]) for k in (0, -1))
    mean = 8 * levels.budget / (12 * 32 * 256)
    beta = 2 * min(mean - least, most - mean) / 11
    found = bits_of(levels, "atp", beta=beta)
    ladder = sorted(bits(t) for _, t in levels.ladder(["blocks.0.w0"]))
    for i, b in enumerate(found):
        wanted = mean + beta * 11 / 2 - beta * i
        around = [max(x for x in ladder if x <= wanted + 1e-9), min(x for x in ladder if x >= wanted - 1e-9)]
        assert b in around
    with pytest.raises(BillhookError, match=r"ATP's beta must be in \[0, .*\] for 12 blocks at"):
        allocate_levels(levels, "atp", beta=beta * 1.01)


def test_alphaq_finds_the_least_noise():
    values = {"alpha_farms": [2.0, 4.0, 3.0, 2.5], "frobenius_sq": [10.0, 20.0, 5.0, 40.0]}
    shapes = [[(8, 256)], [(16, 256)], [(4, 256)], [(12, 256)]]
    levels = make_levels(shapes, share=0.3, value=lambda c, block, layer: values.get(c, [1.0] * 4)[block])
    ladders = [levels.ladder(group) for group in levels.groups]
    median = statistics.median(values["alpha_farms"])

    def noise(choice) -> float:
        return sum(
            median / values["alpha_farms"][k] * values["frobenius_sq"][k] / (out * columns) * 4 ** -bits(type)
            for k, ((_, type), [(out, columns)]) in enumerate(zip(choice, shapes, strict=True))
        )

    possible = [c for c in itertools.product(*ladders) if sum(size for size, _ in c) <= levels.budget]
    types = types_of(allocate_levels(levels, "alphaq"))
    assert noise([(0, types[g[0]]) for g in levels.groups]) == pytest.approx(min(map(noise, possible)))


@pytest.mark.parametrize(
    ("name", "options"),
    [("alphapruning", {"epsilon": 1}), ("alphaq", {"gamma": 11}), ("owl", {"lam": -1}), ("dlp", {"alpha": 9})],
)
def test_illegal_options_are_refused(name: str, options):
    with pytest.raises(BillhookError, match=rf"{next(iter(options))}"):
        allocate_levels(make_levels(TWELVE), name, **options)


def test_uniform_is_one_type_where_the_budget_is_that_type_and_spreads_what_is_left():
    levels = make_levels([[(8, 256), (8, 256)]] * 8)
    exact = sum(levels.bytes([name], "q3_k") for name in levels.shapes)
    plan = allocate_levels(replace(levels, budget=exact + 10), "uniform")
    assert set(types_of(plan).values()) == {"q3_k"}
    step = levels.bytes(["blocks.0.w0"], "q4_k") - levels.bytes(["blocks.0.w0"], "q3_k")
    types = types_of(allocate_levels(replace(levels, budget=exact + 4 * step), "uniform"))
    raised = [k for k, type in enumerate(types.values()) if type == "q4_k"]
    assert len(raised) == 4
    assert [b - a for a, b in itertools.pairwise(raised)] == [4, 4, 4]
