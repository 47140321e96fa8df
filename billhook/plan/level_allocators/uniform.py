"""Uniform for levels: the same type for every tensor, as near as the budget and the types it can have allow.

    v_l = the largest type of at most b bits,   b as large as the budget allows

A tensor without such a type (its columns do not divide by the blocks of small types) gets its smallest. What is left of
the budget raises tensors to their next type, spread evenly over the model.

Limits: it knows nothing about the model. An allocation that does not beat it on held-out text should not be used.
"""

from collections.abc import Sequence

from billhook.plan.levels import Levels, Types
from billhook.plan.storage import bits
from billhook.registry import method


@method(paper="the common baseline")
def uniform(levels: Levels) -> Types:
    """Return one type for all tensors, and the next larger ones for as many as fit."""
    ladders = {group: levels.ladder(group) for group in levels.groups}
    limits = sorted({bits(type) for ladder in ladders.values() for _, type in ladder})
    steps = [{group: _largest(ladder, limit) for group, ladder in ladders.items()} for limit in limits]
    fitting = [step for step in steps if sum(size for size, _ in step.values()) <= levels.budget]
    chosen = dict(fitting[-1] if fitting else {group: ladder[0] for group, ladder in ladders.items()})
    left = levels.budget - sum(size for size, _ in chosen.values())
    order = _spread(levels.groups)
    for above in steps[len(fitting) :]:
        for group in order:
            more = above[group][0] - chosen[group][0]
            if 0 < more <= left:
                chosen[group], left = above[group], left - more
    return {name: type for group, (_, type) in chosen.items() for name in group}


def _largest(ladder: Sequence[tuple[int, str]], limit: float) -> tuple[int, str]:
    """The last step of a ladder with at most `limit` bits, or its first one."""
    return [step for step in ladder if bits(step[1]) <= limit or step is ladder[0]][-1]


def _spread(groups: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The groups in the order of the bit-reversed binary digits of their positions: 0, 4, 2, 6, 1, 5, 3, 7."""
    digits = max(len(groups) - 1, 1).bit_length()
    place = {group: int(f"{k:0{digits}b}"[::-1], 2) for k, group in enumerate(groups)}
    return sorted(groups, key=place.__getitem__)
