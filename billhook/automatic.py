"""The allocation of `--allocator auto`: several are tried in full on held-out calibration windows, and the best is used.

Tried are uniform, the optimum of the measured error curves (`billhook.allocators.auto`), a point between the two (half-way, or a quarter
of the way where the optimum is more than twice as bad as uniform), and OWL with its published options. Each is pruned block by block
with the run's own criterion (admm in three steps) on one part of the calibration windows, and scored by the divergence from the dense
model on the other; equal scores go to the first in this order. Uniform is among them, so the plan is never worse than uniform
there. Where the text cannot be split the plan is uniform, and says why. Deterministic. The model's weights are as before afterwards.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from billhook.allocators import allocate
from billhook.error_curves import CHEAPER
from billhook.errors import BillhookError
from billhook.heldout import split_windows
from billhook.plan import SparsityPlan
from billhook.request import Opened
from billhook.table import Table
from billhook.trials import Bench, Setting

NAME = "auto"
_PUBLISHED = {"lam": 0.08, "m": 5.0}


def needs(criterion: str) -> tuple[str, ...]:
    """The columns that `choose` reads: the error curves, and what OWL reads."""
    return (f"error_curve:{criterion}", f"outlier_ratio:{_PUBLISHED['m']:g}")


def choose(
    opened: Opened,
    table: Table,
    target: float | None,
    pattern: str,
    setting: Setting,
    seed: int,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> SparsityPlan:
    """The best plan; `table` has the columns of `needs`."""
    uniform = allocate(table, target, allocator="uniform", pattern=pattern)
    try:
        split = split_windows(opened, seed)
    except BillhookError as error:
        return _because(uniform, {"reason": f"uniform, because no allocation could be checked: {error}"})
    setting = replace(setting, options={**setting.options, **CHEAPER.get(setting.criterion, {})})
    scores: dict[str, float] = {}
    plans: dict[str, SparsityPlan] = {}
    with Bench(opened.model, opened.layers, split.batches, split.heldout, setting) as bench:

        def score(name: str, plan: SparsityPlan) -> None:
            bench.prune(plan)
            kl = bench.losses(0, len(split.heldout)).kl
            plans[name], scores[name] = plan, sum(kl) / len(kl)
            progress(f"{name}: kl {scores[name]:.4f}")

        def strength(value: float) -> None:
            plan = allocate(table, target, allocator=NAME, pattern=pattern, criterion=setting.criterion, strength=value)
            score(f"strength {value:g}", plan)

        score("uniform", uniform)
        strength(1.0)
        strength(0.5 if scores["strength 1"] < 2 * scores["uniform"] else 0.25)
        score("owl", allocate(table, target, allocator="owl", pattern=pattern, **_PUBLISHED))
    best = min(scores, key=scores.__getitem__)
    return _because(plans[best], {"tried": scores, "best": best, "heldout": split.facts["heldout"]})


def _because(plan: SparsityPlan, facts: Mapping[str, Any]) -> SparsityPlan:
    """The plan with what `auto` found out in its provenance."""
    return replace(plan, made_by={**plan.made_by, "auto": dict(facts)})
