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
    record = history(directory)
    for step in reversed(record.steps if record else []):
        if step.plan and (step.plan.get("made_by") or {}).get("levels"):
            return step, Plan.from_json(step.plan, str(directory))
    raise BillhookError(
        f"{directory} holds no measured levels: billhook compress keeps them with --allocator curves, rco or auto."
    )


def earlier_levels(directory: Path, digest: str | None, menus: Menus, outside: Menus) -> Measured:
    """The measurements for the layers of `menus`, and for embeddings and head, whose menus are `outside`.

    Raises BillhookError where `directory` was not made from the model with this `digest`, or types were not measured.
    """
    step, plan = step_with_levels(directory)
    if step.model.get("digest") != digest:
        raise BillhookError(f"The levels of {directory} are those of another model: {step.model.get('name')}.")
    levels = measured_levels(plan)
    errors = {}
    for name, menu in {**menus, **outside}.items():
        missing = set(menu) - (levels[name].types.keys() if name in levels else set())
        if missing:
            raise BillhookError(
                f"For {name}, {directory} holds no error of {', '.join(sorted(missing))}: not allowed there, or far "
                "from its size. Limit --types to those that were measured there, or leave out --levels."
            )
        errors[name] = {t: levels[name].types[t].error for t in menu}
    return Measured(
        {name: errors[name] for name in menus},
        {name: levels[name].weight for name in menus},
        {name: errors[name] for name in outside},
    )
