"""What a run of `slim` removes: the numbers of parts that stay in each unit, and the blocks that are dropped.

In a plan a dropped block is a unit of its own, `model.layers.5:blocks`, of which nothing is kept.
"""

from collections.abc import Sequence
from dataclasses import replace

from billhook.architectures.units import KINDS, Unit
from billhook.errors import BillhookError
from billhook.plan.allocators import AUTO
from billhook.plan.plan import Plan
from billhook.registry import hint

_BLOCK = ":blocks"  # ends the name of a block as a unit


def kinds_of(given: str | Sequence[str]) -> list[str]:
    """The kinds of units in a request, or ["auto"]; raises BillhookError for unknown or repeated ones."""
    kinds = [x.strip() for x in given.split(",")] if isinstance(given, str) else list(given)
    if kinds == [AUTO]:
        return kinds
    if AUTO in kinds:
        raise BillhookError("The kind of units 'auto' stands alone: it tries all kinds. Leave out it or the others.")
    for kind in kinds:
        if kind not in KINDS:
            raise BillhookError(
                f"Unknown kind of units {kind!r:.40}.{hint(kind, KINDS)} There are: auto, {', '.join(KINDS)}."
            )
    if not kinds or len(set(kinds)) < len(kinds):
        raise BillhookError("Name at least one kind of units, and each of them once.")
    return kinds


def kinds_in(plan: Plan) -> list[str]:
    """The kinds of units that a plan names."""
    found = {name.rpartition(":")[2] for name in plan.units}
    return [kind for kind in KINDS if kind in found]


def blocks_to_drop(kinds: Sequence[str], remove: float, sizes: Sequence[int]) -> int:
    """How many blocks go: all of the fraction `remove` of their parameters, or half of it if other kinds go too.

    `sizes` are the parameters of each block.
    """
    if "blocks" not in kinds:
        return 0
    wanted = remove * len(sizes)
    return max(1, round(wanted) if list(kinds) == ["blocks"] else int(wanted / 2))


def block_unit(block: str) -> str:
    """The name of a block as a unit."""
    return f"{block}{_BLOCK}"


def dropped_by(plan: Plan, blocks: Sequence[str]) -> dict[str, int]:
    """The numbers of the blocks that a plan drops, by name."""
    return {name: index for index, name in enumerate(blocks) if plan.units.get(block_unit(name)) == 0}


def check_plan(
    plan: Plan, units: Sequence[Unit], blocks: Sequence[str], shape: str = "", kinds: Sequence[str] = (AUTO,)
) -> Plan:
    """A given plan in which units of the kinds that it names stay whole where it does not name them, without those of
    blocks that it drops.

    Raises BillhookError where it names other units or blocks, removes others than of these `kinds`, or differs by block
    although the `shape` is uniform.
    """
    known = {unit.name: unit.count for unit in units} | {block_unit(name): 1 for name in blocks}
    if plan.weights or not plan.units:
        raise BillhookError("This plan is not of units alone: billhook slim applies numbers of parts that stay.")
    for name, count in plan.units.items():
        if name not in known:
            raise BillhookError(f"The plan is not for this model: it has no unit {name}.{hint(name, known)}")
        if not (0 if name.endswith(_BLOCK) else 1) <= count <= known[name]:
            raise BillhookError(f"{name}: {count} parts cannot stay of {known[name]}; at least one must.")
        if count < known[name] and AUTO not in kinds and name.rpartition(":")[2] not in kinds:
            raise BillhookError(
                f"The plan removes parts of {name}, and --units names {' and '.join(kinds)} only: leave out --units."
            )
    if len(dropped_by(plan, blocks)) == len(blocks):
        raise BillhookError("The plan drops every block: at least one must stay.")
    gone = dropped_by(plan, blocks).values()
    whole = {unit.name: unit.count for unit in units if unit.block not in gone}
    named = {name: n for name, n in plan.units.items() if name in whole or n == 0}
    plan = replace(plan, units={**named, **{name: n for name, n in whole.items() if name not in named}})
    alike: dict[tuple[str, int], set[int]] = {}
    for unit in units if shape == "uniform" else ():
        if unit.name in whole:
            alike.setdefault((unit.kind, unit.count), set()).add(plan.units[unit.name])
    for (kind, _), numbers in alike.items():
        if len(numbers) > 1:
            raise BillhookError(f"The plan keeps different numbers of {kind} by block: leave out --shape uniform.")
    return plan
