"""How many parts of a unit stay."""

import pytest

from billhook.errors import BillhookError
from billhook.plan.unit_counts import Size, per_layer_counts, proportional, quantum, uniform_counts


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


@pytest.mark.parametrize("share", [0.1, 0.17, 0.2, 0.3, 0.7])
@pytest.mark.parametrize("finest", ["heads", "channels"])
def test_no_kind_keeps_more_than_it_has_where_a_coarse_one_is_rounded_up(share, finest):
    sizes = [Size(f"{block}.experts", "experts", block, 8, 1000, least=2) for block in range(2)]
    sizes += [Size(f"{block}.{finest}", finest, block, 8, 25) for block in range(2)]
    remove = round(share * sum(s.n for s in sizes))
    kept = uniform_counts(sizes, remove, proportional(sizes, ["experts", finest]))
    assert all(s.least <= kept[s.name] <= s.count for s in sizes)
    gone = sum((s.count - kept[s.name]) * s.parameters for s in sizes)
    assert abs(gone - remove) <= 1000 + 25  # half a step of either in both blocks


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.85])
def test_per_layer_counts_follow_the_fractions_and_meet_the_budget_to_half_a_step(share):
    sizes = [Size(f"{block}.mlp", "channels", block, 352, 192) for block in range(4)]
    sizes += [Size(f"{block}.heads", "heads", block, 4, 4000) for block in range(4)]
    remove = round(share * sum(s.n for s in sizes))
    kept = per_layer_counts(sizes, remove, {s.name: share * (0.5 + s.block / 3) for s in sizes})
    gone = {s.name: (s.count - kept[s.name]) * s.parameters for s in sizes}
    assert abs(sum(gone.values()) - remove) <= 32 * 192 / 2
    assert all(kept[s.name] >= 1 and (s.kind == "heads" or kept[s.name] % 32 == 0) for s in sizes)
    assert [kept[f"{block}.mlp"] for block in range(4)] == sorted((kept[f"{i}.mlp"] for i in range(4)), reverse=True)


def test_per_layer_counts_leave_at_least_what_must_stay():
    sizes = [Size("a", "experts", 0, 8, 10, least=2), Size("b", "experts", 1, 8, 10, least=2)]
    assert per_layer_counts(sizes, 100, {"a": 1.0, "b": 0.0}) == {"a": 2, "b": 4}
    with pytest.raises(BillhookError, match="every token goes to 2 experts; at most 120 can go"):
        per_layer_counts(sizes, 130, {"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(("kind", "count", "least"), [("heads", 1, 1), ("experts", 4, 4)])
def test_a_kind_that_can_give_nothing_at_all_is_named(kind, count, least):
    sizes = [Size("a", kind, 0, count, 100, least=least), Size("b", "channels", 0, 64, 10)]
    with pytest.raises(BillhookError, match=f"No {kind} can go, because .*: name other kinds of units"):
        uniform_counts(sizes, 400, proportional(sizes, [kind, "channels"]))
