"""How many parts of a unit stay."""

import pytest

from billhook.plan.unit_counts import Size, quantum, uniform_counts


@pytest.mark.parametrize("count, step", [(11008, 64), (352, 32), (1536, 64), (232, 8), (264, 8), (128, 8), (100, 1)])
def test_channels_are_removed_in_the_largest_step_of_which_there_are_eight(count, step):
    assert quantum(count) == step


@pytest.mark.parametrize("count", [256, 352, 1000, 1408, 11008])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.7])
def test_a_width_that_blocks_of_32_divide_stays_one_and_the_budget_is_met_to_half_a_step(count, share):
    sizes = [Size(f"blocks.{block}.mlp", "channels", block, count, 3 * 64) for block in range(4)]
    remove = round(share * sum(size.count * size.parameters for size in sizes))
    kept = set(uniform_counts(sizes, remove, {"channels": 1.0}).values())
    assert len(kept) == 1
    left = kept.pop()
    assert count % 32 or left % 32 == 0
    assert abs((count - left) * 4 * 3 * 64 - remove) <= quantum(count) * 4 * 3 * 64 / 2
