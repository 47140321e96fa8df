"""From bits to types: storage types whose bits are as near to wanted ones as a budget allows.

    b_l = c · r_l or r_l + c, clipped to the bits of the smallest and largest type,  with c such that Σ n_l b_l = budget
    v_l = the largest type of at most b_l bits

Then types are raised to the next one while the budget allows it, the largest remainder (b_l − bits) / (bits of the next
type − bits) first. Embeddings and head have no wanted bits: they get the types of `uniform`, and layers share the rest.
"""

import heapq
from collections.abc import Callable, Mapping
from typing import Literal

from billhook.plan.level_allocators.uniform import uniform
from billhook.plan.levels import Levels, Types

Group = tuple[str, ...]


def layer_groups(levels: Levels) -> tuple[list[Group], int]:
    """The groups of layers, and the bytes that embeddings and head leave to them."""
    types, outside = uniform(levels), set(levels.outside)
    left = levels.budget - sum(levels.bytes([name], types[name]) for name in levels.outside)
    return [group for group in levels.groups if group[0] not in outside], left


def mean_bits(levels: Levels) -> tuple[float, float, float]:
    """Bits a weight of the layers: the least possible, the budget's, and the largest possible."""
    groups, left = layer_groups(levels)
    n = sum(map(levels.weights_in, groups))
    ends = [sum(levels.ladder(group)[k][0] for group in groups) for k in (0, -1)]
    return 8 * ends[0] / n, 8 * min(left, ends[1]) / n, 8 * ends[1] / n


def nearest_types(levels: Levels, raw: Mapping[str, float], keep: Literal["ratios", "differences"]) -> Types:
    """The types for bits that have the ratios or the differences of `raw` (by layer), within the budget."""
    groups, left = layer_groups(levels)
    n = {group: levels.weights_in(group) for group in groups}
    means = {group: sum(raw[name] * levels.weights_in([name]) for name in group) / n[group] for group in groups}
    ladders = {group: levels.ladder(group) for group in groups}
    ends = {group: (8 * ladders[group][0][0] / n[group], 8 * ladders[group][-1][0] / n[group]) for group in groups}

    def at(c: float) -> dict[Group, float]:
        moved = {group: c * r if keep == "ratios" else r + c for group, r in means.items()}
        return {group: min(max(b, ends[group][0]), ends[group][1]) for group, b in moved.items()}

    least, most = min(low for low, _ in ends.values()), max(high for _, high in ends.values())
    if keep == "ratios":
        low, high = 0.0, most / min((r for r in means.values() if r > 0), default=1.0)
    else:
        low, high = least - max(means.values()), most - min(means.values())
    wanted = at(_solve(lambda c: sum(n[g] * b for g, b in at(c).items()), 8 * left, low, high))
    types = uniform(levels)
    for group, ladder in ladders.items():
        below = [type for size, type in ladder if 8 * size / n[group] <= wanted[group] * (1 + 1e-12)]
        types.update(dict.fromkeys(group, below[-1] if below else ladder[0][1]))
    return raised(levels, types, wanted)


def raised(levels: Levels, types: Mapping[str, str], wanted: Mapping[Group, float]) -> Types:
    """`types` raised while the budget allows it, the largest remainder of the `wanted` bits first."""
    found, left = dict(types), levels.budget - levels.total(types)
    ladders = {group: levels.ladder(group) for group in levels.groups}
    place = {group: [t for _, t in ladder].index(found[group[0]]) for group, ladder in ladders.items()}
    heap: list[tuple[float, int, Group]] = []

    def push(order: int, group: Group) -> None:
        if place[group] + 1 < len(ladders[group]):
            n, (now, _), (above, _) = levels.weights_in(group), *ladders[group][place[group] :][:2]
            own = 8 * now / n
            heapq.heappush(heap, (-(wanted.get(group, own) - own) / (8 * (above - now) / n), order, group))

    for order, group in enumerate(levels.groups):
        push(order, group)
    while heap:
        _, order, group = heapq.heappop(heap)
        (now, _), (above, type) = ladders[group][place[group] :][:2]
        if above - now <= left:
            place[group], left = place[group] + 1, left - (above - now)
            found.update(dict.fromkeys(group, type))
            push(order, group)
    return found


def _solve(total: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The largest c in [low, high] for which the rising `total`(c) is at most `target`, or else `low`."""
    if total(high) <= target:
        return high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if total(middle) <= target else (low, middle)
    return low
