"""Uniform for levels: the same type for every tensor, as near as the budget and the menus allow.

    v_l = the largest type of at most b bits,   b as large as the budget allows

A tensor without such a type (its columns do not divide by the blocks of small types) gets its smallest. What is left of
the budget raises tensors to their next type, spread evenly over the model.

Limits: it knows nothing about the model. An allocation that does not beat it on held-out text should not be used.
"""

from collections.abc import Mapping, Sequence

from billhook.plan.levels import Levels, Types
from billhook.plan.storage import bits
from billhook.registry import method


@method(paper="the common baseline")
def uniform(levels: Levels) -> Types:
    """Return one type for all tensors, and the next larger one for as many as fit."""
    menus = {group: levels.menu(group) for group in levels.groups}
    limits = sorted({bits(t) for menu in menus.values() for t in menu})
    below = [{group: _largest(menu, limit) for group, menu in menus.items()} for limit in limits]
    fitting = [choice for choice in below if _bytes(levels, choice) <= levels.budget]
    chosen = fitting[-1] if fitting else below[0]
    following = [choice for choice in below if choice not in fitting]
    for choice in following:
        chosen = _raised(levels, chosen, choice)
    return {name: type for group, type in chosen.items() for name in group}


def _largest(menu: Sequence[str], limit: float) -> str:
    return max((t for t in menu if bits(t) <= limit), key=lambda t: (bits(t), t), default=menu[0])


def _bytes(levels: Levels, choice: Mapping[tuple[str, ...], str]) -> int:
    return sum(levels.bytes(group, type) for group, type in choice.items())


def _raised(
    levels: Levels, chosen: Mapping[tuple[str, ...], str], above: Mapping[tuple[str, ...], str]
) -> dict[tuple[str, ...], str]:
    """`chosen` with as many groups as fit at their type in `above`, in an order that is spread over the model."""
    raised, left = dict(chosen), levels.budget - _bytes(levels, chosen)
    for group in _spread(list(chosen)):
        step = levels.bytes(group, above[group]) - levels.bytes(group, raised[group])
        if 0 < step <= left:
            raised[group], left = above[group], left - step
    return raised


def _spread(groups: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The groups in the order of the bit-reversed binary digits of their positions: 0, 4, 2, 6, 1, 5, 3, 7."""
    digits = max(len(groups) - 1, 1).bit_length()
    return sorted(groups, key={g: int(f"{k:0{digits}b}"[::-1], 2) for k, g in enumerate(groups)}.__getitem__)
