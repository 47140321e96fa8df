"""Clipping, restoring the mean and rounding: the properties that make every budget exact."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.plan.budget import mean, min_max, scale_to, shift_to, whole_numbers

relaxed = settings(deadline=None, max_examples=60)
SIZES = st.integers(1, 10**9)
TARGETS = st.floats(0, 1)


def weighted(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[list[float], list[int]]]:
    return st.lists(st.tuples(values, SIZES), min_size=1, max_size=40).map(
        lambda pairs: ([v for v, _ in pairs], [n for _, n in pairs])
    )


def in_order(raw: list[float], values: list[float]) -> bool:
    return all(a <= b for (_, a), (_, b) in pairwise(sorted(zip(raw, values, strict=True))))


@relaxed
@given(weighted(st.floats(1e-6, 1e6)), TARGETS)
def test_scaling_meets_the_target_in_the_same_order(weighted, target):
    raw, n = weighted
    values = scale_to(raw, n, target)
    assert all(0 <= v <= 1 + 1e-15 for v in values)
    assert mean(values, n) == pytest.approx(target, abs=1e-9)
    assert in_order(raw, values)


@relaxed
@given(weighted(st.floats(-100, 100)), TARGETS)
def test_shifting_meets_the_target_in_the_same_order(weighted, target):
    raw, n = weighted
    values = shift_to(raw, n, target)
    assert all(0 <= v <= 1 for v in values)
    assert mean(values, n) == pytest.approx(target, abs=1e-9)
    assert in_order(raw, values)


def test_sparsities_within_limits_are_only_scaled_or_shifted():
    assert scale_to([1, 2, 3], [1, 1, 1], 0.4) == pytest.approx([0.2, 0.4, 0.6])
    assert shift_to([0.1, 0.2, 0.3], [1, 1, 2], 0.5) == pytest.approx([0.375, 0.475, 0.575])
    legal = [0.1, 0.2, 0.6]
    assert shift_to(legal, [1, 1, 1], 0.3) == legal  # to the last bit: published counts are rounded down from it


def test_the_excess_of_clipped_layers_goes_to_the_others():
    assert scale_to([1, 1, 10], [1, 1, 1], 0.5) == pytest.approx([0.25, 0.25, 1])
    assert shift_to([0, 0, 0.9], [1, 1, 1], 0.6) == pytest.approx([0.4, 0.4, 1])
    assert shift_to([0, 0.9, 0.9], [1, 1, 1], 0.3) == pytest.approx([0, 0.45, 0.45])


def test_a_layer_of_weight_zero_changes_only_when_the_others_cannot():
    assert scale_to([0, 1, 1], [2, 1, 1], 0.5) == pytest.approx([0, 1, 1], abs=1e-8)
    assert scale_to([0, 1, 1], [2, 1, 1], 0.75) == pytest.approx([0.5, 1, 1])


def test_min_max_maps_values_to_0_and_1():
    assert min_max([3, 1, 2]) == [1, 0, 0.5]
    assert min_max([7, 7]) == [0.5, 0.5]
    assert min_max([0, 0]) == [0.5, 0.5]
    assert min_max([0.1 + 0.2, 0.3]) == [0.5, 0.5]
    assert min_max([2, 2 + 1e-9]) == [0, 1]  # the whole range, however little the values differ


@relaxed
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**6)), min_size=1, max_size=40))
def test_whole_numbers_have_the_rounded_total(pairs):
    exact, ceilings = [s * n for s, n in pairs], [n for _, n in pairs]
    whole = whole_numbers(exact, ceilings)
    assert abs(sum(whole) - math.fsum(exact)) <= 0.5 + 1e-6
    assert all(0 <= k <= top and abs(k - x) < 1 for k, x, top in zip(whole, exact, ceilings, strict=True))


def test_the_largest_remainders_are_rounded_up_the_first_of_equals_first():
    assert whole_numbers([1.2, 1.9, 1.9], [9] * 3) == [1, 2, 2]
    assert whole_numbers([0.5, 0.5, 0.5, 0.5], [9] * 4) == [1, 1, 0, 0]
    assert whole_numbers([0.5], [9]) == [1]
    assert whole_numbers([2.0, 3.0], [2, 3]) == [2, 3]


def test_rounding_of_unequal_steps_ends_near_the_total():
    # Rounding the large one up overshoots by more than a small step: small ones are rounded down again.
    assert whole_numbers([0.95, 0.9, 0.55], [4] * 3, [1, 1, 4]) == [0, 0, 1]
    assert whole_numbers([0.1, 0.6], [4] * 2, [1, 10]) == [0, 1]
    assert whole_numbers([1.0, 0.6], [4] * 2, [1, 10]) == [1, 1]  # what is whole already is left alone
