"""What an earlier `compress` of the same model measured, from which types for another size are chosen (`--levels`)."""

from collections.abc import Mapping
from pathlib import Path

from billhook.errors import BillhookError
from billhook.plan.front import measured_levels
from billhook.plan.plan import Plan
from billhook.steps.levels import Measured
from billhook.store.record import Step, history

Menus = Mapping[str, list[str]]  # types by tensor


def step_with_levels(directory: Path) -> tuple[Step, Plan]:
    """The last step of a compressed model that measured levels, and its plan; raises BillhookError if there is none."""
    if not directory.is_dir():
        raise BillhookError(f"There is no directory {directory}: levels are those of the output of billhook compress.")
    record = history(directory)
    for step in reversed(record.steps if record else []):
        if step.plan and (step.plan.get("made_by") or {}).get("levels"):
            return step, Plan.from_json(step.plan, str(directory))
    raise BillhookError(
        f"{directory} holds no measured levels: billhook compress keeps them with --allocator curves, rco or auto."
    )


def earlier_levels(directory: Path, digest: str | None, menus: Menus, outside: Menus) -> tuple[Measured, list[str]]:
    """The measurements for the layers of `menus`, and for embeddings and head, whose menus are `outside`; and a note on
    types that were not measured, which are left out.

    Raises BillhookError where `directory` was not made from the model with this `digest`, or none of a tensor's types
    was measured.
    """
    step, plan = step_with_levels(directory)
    if step.model.get("digest") != digest:
        raise BillhookError(
            f"The levels of {directory} are those of another model: {step.model.get('name')}. Leave them out."
        )
    levels = measured_levels(plan)
    errors, left_out = {}, set()
    for name, menu in {**menus, **outside}.items():
        known = levels[name].types if name in levels else {}
        errors[name] = {t: known[t].error for t in menu if t in known}
        left_out |= set(menu) - known.keys()
        if not errors[name]:
            those = f"only of {', '.join(sorted(known))}" if known else "of no type"
            raise BillhookError(
                f"For {name}, {directory} holds no error of {', '.join(sorted(menu))}, {those}. Leave out --levels."
            )
    found = Measured(
        {name: errors[name] for name in menus},
        {name: levels[name].weight for name in menus},
        {name: errors[name] for name in outside},
    )
    if not left_out:
        return found, []
    return found, [
        f"{', '.join(sorted(left_out))} were left out where {directory} did not measure them: not allowed there, or "
        "far from its size. Without --levels all types near the size are measured."
    ]
