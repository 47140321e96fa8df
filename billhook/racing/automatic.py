"""The allocation of `--allocator auto`: three are tried in full on held-out calibration windows, and the best is used.

Tried, each pruned block by block with the run's own criterion on one part of the calibration windows (by admm in three
steps, unless the run was given `steps`) and scored by the divergence from the dense model on the other:

1. uniform. Of its divergence each layer's share is measured (`billhook.trials.attribution`).
2. the optimum of the measured error curves with these shares (`billhook.plan.allocators.curves`). Its shares are
   measured, too.
3. what looks best then: the optimum with the geometric mean of both shares, for shares change with the plan (of a layer
   that 2 hardly prunes, with its first share); or, where 2 was no better than uniform, half of its way; or the best of
   the published knobs of ATP, OWL and DLP, where shares and curves foretell that it beats all that was tried.

Equal scores go to the first in this order. Uniform is among them, so the plan is never worse than uniform there. Where
the text cannot be split the plan is uniform, and says why. Deterministic. The model's weights are as before afterwards.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from billhook.errors import BillhookError
from billhook.measurement.error_curves import cheaper
from billhook.plan.allocators import ALLOCATORS, AUTO, allocate
from billhook.plan.allocators.curves import LEAST, MIDDLE, at
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.racing.knobs import Space
from billhook.steps.request import Opened
from billhook.trials.attribution import FLOOR
from billhook.trials.heldout import split_windows
from billhook.trials.trials import Bench, Setting

Shares = Mapping[str, float]
PUBLISHED = ("atp", "owl", "dlp")


def needs(criterion: str) -> tuple[str, ...]:
    """The columns that `choose` reads: the error curves, and what the published allocators read."""
    options = [candidate for name in PUBLISHED for candidate in Space((name,), {}, 2, 0.5, grid=True).candidates()]
    return (
        f"error_curve:{criterion}",
        *dict.fromkeys(n for c in options for n in ALLOCATORS.needs(c.allocator, c.options)),
    )


def choose(
    opened: Opened,
    table: Table,
    target: float | None,
    pattern: str,
    setting: Setting,
    seed: int,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The best plan; `table` has the columns of `needs`."""
    forecast = _Forecast(table, setting.criterion, target, pattern)
    try:
        split = split_windows(opened, seed)
    except BillhookError as error:
        return _because(forecast.uniform, {"reason": f"uniform, because no allocation could be checked: {error}"})
    told = {name: value for name, value in setting.options.items() if value is not None}
    setting = replace(setting, options={**cheaper(setting.criterion, opened.layers), **told})
    scores: dict[str, float] = {}
    plans: dict[str, Plan] = {}
    with Bench(opened.model, opened.layers, split.batches, split.heldout, setting) as bench:

        def score(name: str, plan: Plan, measured: bool = False) -> Shares:
            """Prune and score; the shares, as if all layers lost `MIDDLE`, if they are to be measured."""
            bench.prune(plan)
            kl, shares = bench.attribute() if measured else (bench.losses(0, len(split.heldout)).kl, {})
            plans[name], scores[name] = plan, math.fsum(kl) / len(kl)
            progress(f"{name}: kl {scores[name]:.4f}")
            return forecast.at_middle(shares, plan)

        first = score("uniform", forecast.uniform, measured=True)
        second = score("curves", forecast.optimum(first), measured=True)
        name, plan, foretold = forecast.published(first, scores["uniform"])
        if foretold < min(scores.values()):
            score(name, plan)
        elif scores["curves"] < scores["uniform"]:
            score("curves again", forecast.optimum(forecast.both(first, second, plans["curves"])))
        else:
            score("curves, half", forecast.optimum(first, 0.5))
    best = min(scores, key=scores.__getitem__)
    facts = {"tried": scores, "best": best, "foretold": {name: foretold}, "heldout": split.facts["heldout"]}
    return _because(plans[best], facts)


class _Forecast:
    """What error curves and shares together say about plans, without trying them."""

    def __init__(self, table: Table, criterion: str, target: float | None, pattern: str) -> None:
        self.table, self.criterion, self.target, self.pattern = table, criterion, target, pattern
        self.uniform = allocate(table, target, allocator="uniform", pattern=pattern)
        self._curves = dict(zip(table.shapes, table.curve(f"error_curve:{criterion}"), strict=True))

    def optimum(self, shares: Shares, strength: float = 1.0) -> Plan:
        """The plan of `curves`, or part of the way to it."""
        column = f"loss_share:{self.criterion}"
        rows = tuple(replace(row, metrics={**row.metrics, column: shares[row.layer]}) for row in self.table)
        options = {"criterion": self.criterion, "strength": strength}
        return allocate(
            replace(self.table, rows=rows), self.target, allocator="curves", pattern=self.pattern, **options
        )

    def published(self, shares: Shares, divergence: float) -> tuple[str, Plan, float]:
        """The best of the published knobs: its name, its plan and the divergence that it is to have, where uniform's
        was `divergence`."""
        found = {}
        for one in Space(PUBLISHED, {}, len(self.table.blocks()), self.uniform.target, grid=True).candidates():
            plan = allocate(self.table, self.target, allocator=one.allocator, pattern=self.pattern, **one.options)
            options = ", ".join(f"{key}={value}" for key, value in one.options.items())
            found[f"{one.allocator} ({options})"] = (
                plan,
                divergence * self._loss(shares, plan) / self._loss(shares, self.uniform),
            )
        name = min(found, key=lambda name: found[name][1])
        return name, *found[name]

    def at_middle(self, shares: Shares, plan: Plan) -> dict[str, float]:
        """What shares measured under `plan` would be at `MIDDLE`."""
        return {
            layer: share * self._error(layer, MIDDLE) / self._error(layer, plan.sparsity[layer])
            for layer, share in shares.items()
        }

    def both(self, first: Shares, second: Shares, plan: Plan) -> dict[str, float]:
        """The geometric mean of shares measured under uniform and under `plan`, both at `MIDDLE`; the first where
        `plan` spares a layer so much that its share there is below what can be measured (`FLOOR`), for at `MIDDLE` that
        would count for anything."""

        def spared(layer: str) -> bool:
            return self._error(layer, plan.sparsity[layer]) < FLOOR * self._error(layer, self.uniform.sparsity[layer])

        return {layer: one if spared(layer) else math.sqrt(one * second[layer]) for layer, one in first.items()}

    def _loss(self, shares: Shares, plan: Plan) -> float:
        losses = (
            share * self._error(layer, plan.sparsity[layer]) / self._error(layer, MIDDLE)
            for layer, share in shares.items()
        )
        return math.fsum(losses)

    def _error(self, layer: str, sparsity: float) -> float:
        return max(at(self._curves[layer], sparsity), LEAST)


def _because(plan: Plan, facts: Mapping[str, Any]) -> Plan:
    """The plan with what `auto` found out in its provenance."""
    return replace(plan, made_by={**plan.made_by, AUTO: dict(facts)})
