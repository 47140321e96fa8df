"""What a run of `slim` removes where no plan is given: the kinds of units, the blocks, and the parts of each unit."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from billhook.architectures.config import text_config
from billhook.architectures.slim_blocks import check_blocks
from billhook.architectures.slim_config import check_per_layer
from billhook.architectures.stacks import blocks_of
from billhook.architectures.units import Unit, find_units
from billhook.engine.removal import Removal
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.plan.plan import Budget, Plan
from billhook.plan.table import Table
from billhook.plan.unit_counts import check_room
from billhook.racing.units import UnitProblem
from billhook.steps.block_choice import BlockOrder
from billhook.steps.request import Opened, in_memory
from billhook.steps.slim_allocation import UnitAllocation, allocate_units, sizes_of
from billhook.steps.slim_contest import best_plan
from billhook.steps.slim_job import SlimJob, SlimRequest
from billhook.steps.slim_plan import block_unit, blocks_to_drop, dropped_by

_UNIFORM = UnitAllocation("uniform", {}, "uniform")


def choose_kinds(
    request: SlimRequest, opened: Opened, removal: Removal, allocation: UnitAllocation,
    checked: Callable[[Plan], SlimJob], progress: Progress,
) -> Plan:  # fmt: skip
    """The best of several choices of kinds, each of which is tried on text in a uniform shape, then allocated.

    `checked` raises BillhookError for a plan that cannot be written.
    """
    assert request.remove is not None
    if removal.gradient:
        raise BillhookError(f"--units auto does not compute gradients for {removal.method}: name kinds of units.")
    whole = in_memory(opened, request.model_request())
    order = BlockOrder(whole, request.drop_by, progress)

    def planned(kinds: Sequence[str]) -> tuple[Plan, float]:
        if allocation.shape == "per-layer":
            check_per_layer(whole.model, units_of(whole, kinds))
        plan = choose_plan(request, whole, kinds, removal, _UNIFORM, progress, order=order)
        job = checked(plan)
        return plan, job.removed / sum(job.parameters)

    best = best_plan(whole, removal, request.experts, request.remove, planned, progress)
    kinds = best.made_by["options"]["kinds"].split(",")
    units = [unit for unit in units_of(whole, kinds) if unit.name in best.units]
    gone = list(dropped_by(best, list(blocks_of(whole.model))).values())
    better = _allocated(request, whole, units, gone, removal=removal, allocation=allocation, progress=progress)
    options = {**best.made_by["options"], **better.made_by["options"]}
    return replace(better, units={**best.units, **better.units}, made_by={**better.made_by, "options": options})


def choose_plan(
    request: SlimRequest, opened: Opened, kinds: Sequence[str], removal: Removal, allocation: UnitAllocation,
    progress: Progress, *, order: BlockOrder | None = None,
) -> Plan:  # fmt: skip
    """The plan of a request for units of these kinds: blocks that are dropped, then parts of units.

    Raises BillhookError where nothing would go, or nothing would stay.
    """
    assert request.remove is not None
    blocks, units = blocks_of(opened.model), units_of(opened, kinds)
    if "blocks" in kinds:
        check_blocks(opened.model)
    if allocation.shape == "per-layer":
        check_per_layer(opened.model, units)
    number, gone = blocks_to_drop(kinds, request.remove, parameters_of(opened)), list[int]()
    if number or (allocation.on_trial and units):
        opened = in_memory(opened, request.model_request())
        units = units_of(opened, kinds)
    if number:
        gone = (order or BlockOrder(opened, request.drop_by, progress)).first(number)
    units = [unit for unit in units if unit.block not in gone]
    plan = _allocated(request, opened, units, gone, removal=removal, allocation=allocation, progress=progress)
    if not gone and all(plan.units[unit.name] == unit.count for unit in units):
        raise BillhookError(f"Removing {request.remove:g} of the blocks takes nothing away from any unit: remove more.")
    plan.units.update({block_unit(name): 0 for index, name in enumerate(blocks) if index in gone})
    if number:
        plan.made_by["options"]["drop_by"] = request.drop_by
    if number and removal.drifts:
        plan.units.update(_making_up(opened, plan, gone))
    return plan


def units_of(opened: Opened, kinds: Sequence[str]) -> list[Unit]:
    """The units of these kinds in the chosen stacks, of which blocks have none."""
    chosen = {layer.block for layer in opened.layers}
    return find_units(opened.model, [kind for kind in kinds if kind != "blocks"], chosen)


def parameters_of(opened: Opened) -> list[int]:
    """The parameters of each block."""
    return [sum(p.numel() for p in block.parameters()) for block in blocks_of(opened.model).values()]


def _allocated(
    request: SlimRequest, opened: Opened, units: Sequence[Unit], gone: Sequence[int],
    *, removal: Removal, allocation: UnitAllocation, progress: Progress,
) -> Plan:  # fmt: skip
    """How many parts of `units` stay, where the blocks `gone` are dropped and the others give the rest."""
    assert request.remove is not None
    sizes, parameters = sizes_of(units, text_config(opened.model.config)), parameters_of(opened)
    wanted = round(request.remove * sum(parameters))
    left, stays = max(0, wanted - sum(parameters[block] for block in gone)), sum(parameters) - wanted
    if not units:
        return Plan(Budget("parameters", stays), {}, {}, {"allocator": "uniform", "options": {}, "paper": None})
    check_room(sizes, left)
    shares = left / sum(size.n for size in sizes)
    problem = UnitProblem(Table(()), shares, sizes=sizes, remove=left, shape=allocation.shape, stays=stays)
    return allocate_units(
        allocation, opened, units, problem, removal,
        experts=request.experts, gone=gone, seed=request.seed, progress=progress,
    )  # fmt: skip


def _making_up(opened: Opened, plan: Plan, dropped: Sequence[int]) -> dict[str, int]:
    """Units that lose nothing, whose output projections are refitted to make up for the blocks that are dropped."""
    whole: dict[str, int] = {}
    for kind in ("channels", "heads"):
        try:
            units = find_units(opened.model, [kind])
        except BillhookError:  # the model has none of this kind
            continue
        dense = [u for u in units if u.consumer is not None and u.consumer.expert is None and u.block not in dropped]
        whole |= {unit.name: unit.count for unit in dense if unit.name not in plan.units}
    return whole
