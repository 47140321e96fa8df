"""Which kinds of units should give what is removed: every sensible choice is carried out and compared on text.

The candidates are the kinds that a model has: channels, channels with heads, blocks, blocks with channels, and for
mixtures experts, and experts with channels and heads. Each is carried out on the whole model in memory with three
quarters of the calibration samples, and scored on the others by the KL divergence from the dense model. The weights are
restored afterwards.

Because units are large, candidates remove a little more or less than asked. None is to win by what it leaves, so a
divergence is multiplied by the square of the fraction asked for over the fraction removed: it grows about like that.
Candidates that remove far less than another are not scored.

Cost: for each candidate as much as the run itself, and for those with blocks the choice of blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from billhook.architectures.stacks import blocks_of
from billhook.architectures.units import Unit, find_units
from billhook.engine.batch import rows_of, select_rows, split_rows
from billhook.engine.removal import Removal, changed_layers, dropping, remove_parts_
from billhook.engine.restore import restored
from billhook.engine.routing import unrestrict_
from billhook.errors import BillhookError
from billhook.evaluation.quality import Reference
from billhook.plan.allocators import AUTO
from billhook.plan.plan import Plan
from billhook.steps.request import Opened
from billhook.steps.slim_plan import dropped_by, kinds_in

CANDIDATES = (
    ("channels",),
    ("channels", "heads"),
    ("blocks",),
    ("channels", "blocks"),
    ("experts",),
    ("experts", "channels", "heads"),
)
WINDOWS = 16  # on which candidates are compared, at most
_ALIKE = 0.03  # of the parameters in blocks: candidates that remove so much less are still compared


def best_plan(
    opened: Opened,
    removal: Removal,
    experts: str,
    remove: float,
    planned: Callable[[Sequence[str]], tuple[Plan, float]],
    progress: Callable[[str], None] = lambda candidate: None,
) -> Plan:
    """The plan with the least divergence among those that `planned` makes for candidates, a model in memory given.

    The fraction `remove` was asked for. `planned` returns a plan and the fraction that it removes, and raises
    BillhookError for a candidate that the model cannot have. The plan's `made_by` names the candidates that were
    scored, with their divergences at the fraction asked for. Raises BillhookError where there are too few samples, or
    every candidate is impossible.
    """
    samples, model = opened.samples, opened.model
    assert samples is not None
    rows = rows_of(samples.batch)
    scored = min(WINDOWS, rows // 4)
    if not scored:
        raise BillhookError(f"--units auto compares kinds on calibration text: give at least 4 samples, not {rows}.")
    reference = Reference.of(
        model, select_rows(samples.batch, slice(rows - scored, rows)), opened.task, samples.source, held_out=False
    )
    batches = split_rows(select_rows(samples.batch, slice(0, rows - scored)), rows_of(opened.batches[0]))
    tried, plans = dict[str, float](), _plans(planned, remove)
    for name, (plan, removed) in plans.items():
        units = [u for u in find_units(model, [k for k in kinds_in(plan) if k != "blocks"]) if u.name in plan.units]
        with carried_out(replace(opened, batches=batches), units, plan, removal, experts):
            kl = reference.compare(model).divergence
        tried[name] = float("inf") if kl is None else kl * (remove / removed) ** 2
        progress(name)
    best = min(tried, key=tried.__getitem__)
    about = {"kinds": best, "tried": {name: kl for name, kl in tried.items() if kl < float("inf")}}
    plan, _ = plans[best]
    options = {**plan.made_by["options"], **about}
    return replace(plan, made_by={**plan.made_by, "allocator": AUTO, "options": options})


def _plans(planned: Callable[[Sequence[str]], tuple[Plan, float]], remove: float) -> dict[str, tuple[Plan, float]]:
    """The plans that are compared, by candidate, with what they remove: all but those that remove far too little.

    Raises BillhookError where every candidate is impossible.
    """
    found, problems = dict[str, tuple[Plan, float]](), list[str]()
    for kinds in CANDIDATES:
        name = ",".join(kinds)
        try:
            found[name] = planned(kinds)
        except BillhookError as problem:
            problems.append(f"{name}: {problem}")
    if not found:
        raise BillhookError(f"No kind of units can give that much. {' '.join(problems)}")
    short = min(abs(remove - removed) for _, removed in found.values()) + _ALIKE
    return {name: (plan, removed) for name, (plan, removed) in found.items() if remove - removed <= short}


@contextmanager
def carried_out(opened: Opened, units: Sequence[Unit], plan: Plan, removal: Removal, experts: str) -> Iterator[None]:
    """Carry out a plan on a model in memory for a `with` block."""
    model = opened.model
    gone = dropped_by(plan, list(blocks_of(model)))
    units = [unit for unit in units if unit.block not in gone.values()]
    if any(unit.kind == "experts" for unit in units):
        removal = removal.without_target()
    with restored(changed_layers(model, units)), dropping(model, list(gone.values())) as dropped:
        try:
            remove_parts_(model, units, plan.units, removal, opened.batches, experts=experts, dropped=dropped)
            yield
        finally:
            unrestrict_(model, units)
