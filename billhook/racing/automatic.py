"""The plan of `--allocator auto`, or of an allocator whose hyperparameter is `auto`, chosen by a race.

`auto` races, each plan pruned in full with the run's own criterion (admm in three steps, unless `steps` is given):

1. uniform. Each layer's share of its divergence is measured (`billhook.trials.attribution`).
2. `curves`: the optimum of the measured error curves with these shares (`billhook.plan.allocators.curves`). Its shares
   are measured, too.
3. `curves again`: the optimum with the geometric mean of both shares, for shares change with the plan; or, where 2 was
   no better than uniform, `curves, half`: halfway from uniform to it.
4. OWL at three values of lam, for criteria that choose a mask and update no weights: with them a trial costs little,
   and OWL sometimes wins. With weight updates it never did.

Half of the calibration windows are for pruning, the other half for scoring. Where there are too few to be split, the
plan is uniform and its record says why.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.errors import BillhookError
from billhook.measurement.error_curves import cheaper
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, AUTO
from billhook.plan.allocators.curves import LEAST, MIDDLE, at
from billhook.plan.plan import SparsityPlan
from billhook.racing.hyperparameters import Space
from billhook.racing.race import Candidate, Problem, Race
from billhook.text.windows import Tokens
from billhook.trials.attribution import FLOOR
from billhook.trials.heldout import split_windows
from billhook.trials.trials import Setting, TrialRunner

Shares = Mapping[str, float]


def needs(criterion: str) -> tuple[str, ...]:
    """The columns that `auto` reads."""
    columns = [name for options in _owl(criterion) for name in ALLOCATORS.needs("owl", options)]
    return f"error_curve:{criterion}", *dict.fromkeys(columns)


def _owl(criterion: str) -> list[dict[str, Any]]:
    """The options of OWL that `auto` tries."""
    updates = "gram" in CRITERIA.needs(criterion, CRITERIA.configure(criterion, {}))
    return [ALLOCATORS.configure("owl", {"lam": lam}) for lam in (() if updates else (0.05, 0.1, 0.2))]


def trial_setting(setting: Setting, layers: Sequence[Layer]) -> Setting:
    """How trials prune: as the run, but cheaper, except for the options that were given."""
    given = {name: value for name, value in setting.options.items() if value is not None}
    return replace(setting, options={**cheaper(setting.criterion, layers), **given})


def choose(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    tokens: Tokens,
    problem: Problem,
    setting: Setting,
    *,
    allocator: str = AUTO,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> SparsityPlan:
    """The best plan on held-out windows of `tokens`; the model's weights are restored.

    `allocator` is `auto`, or one whose hyperparameter is to be chosen, with its other `options`. The problem's table
    has the columns that these read; `setting` is how the run prunes, and `seed` splits the windows.
    """
    uniform = problem.allocate("uniform", {})
    try:
        split = split_windows(tokens, batch_size, seed)
    except BillhookError as error:
        return replace(uniform, made_by={**uniform.made_by, "racing": {"reason": f"uniform without a race: {error}"}})
    given = {key: value for key, value in (options or {}).items() if value != AUTO}
    space = Space((allocator,), given, len(problem.table.blocks()), uniform.target)
    with TrialRunner(model, layers, split.batches, split.heldout, trial_setting(setting, layers)) as runner:
        race = Race(runner, progress=progress)
        race.run(lambda race: schedule(space, problem, setting.criterion, race))
    return race.result({"heldout": split.facts["heldout"]})


def schedule(space: Space, problem: Problem, criterion: str, race: Race) -> Iterator[Candidate]:
    """The candidates of `auto`, if it is among the allocators, and those of the others."""
    if AUTO in space.allocators:
        yield from _auto(problem, criterion, race)
    yield from space.schedule(problem, race)


def _auto(problem: Problem, criterion: str, race: Race) -> Iterator[Candidate]:
    curves = ErrorCurves(problem, criterion)
    yield Candidate("uniform", curves.uniform, attribute=True)
    first = curves.at_middle(race.trials["uniform"].shares, curves.uniform)
    yield Candidate("curves", curves.optimum(first), attribute=True)
    if race.best.name == "curves":
        second = curves.at_middle(race.best.shares, race.plans["curves"])
        yield Candidate("curves again", curves.optimum(curves.both(first, second, race.plans["curves"])))
    else:
        yield Candidate("curves, half", curves.optimum(first, 0.5))
    for options in _owl(criterion):
        yield problem.candidate("owl", options)


class ErrorCurves:
    """Plans from the error curves of the problem's table and given shares."""

    def __init__(self, problem: Problem, criterion: str) -> None:
        self.problem, self.criterion = problem, criterion
        self.uniform = problem.allocate("uniform", {})
        curves = problem.table.curve(f"error_curve:{criterion}")
        self._curves = dict(zip(problem.table.shapes, curves, strict=True))

    def optimum(self, shares: Shares, strength: float = 1.0) -> SparsityPlan:
        """The plan of `curves`, or the part `strength` of the way to it from uniform."""
        table, column = self.problem.table, f"loss_share:{self.criterion}"
        rows = tuple(replace(row, metrics={**row.metrics, column: shares[row.layer]}) for row in table)
        problem = replace(self.problem, table=replace(table, rows=rows))
        return problem.allocate("curves", {"criterion": self.criterion, "strength": strength})

    def at_middle(self, shares: Shares, plan: SparsityPlan) -> dict[str, float]:
        """What shares measured under `plan` would be if every layer's sparsity were `MIDDLE`."""
        return {
            layer: share * self._error(layer, MIDDLE) / self._error(layer, plan.sparsity[layer])
            for layer, share in shares.items()
        }

    def both(self, first: Shares, second: Shares, plan: SparsityPlan) -> dict[str, float]:
        """The geometric mean of shares measured under uniform and under `plan`, both at `MIDDLE`.

        Only the first where `plan` prunes a layer so little that its share there is below what can be measured
        (`FLOOR`): at `MIDDLE` that would be any number.
        """

        def spared(layer: str) -> bool:
            return self._error(layer, plan.sparsity[layer]) < FLOOR * self._error(layer, self.uniform.sparsity[layer])

        return {layer: one if spared(layer) else math.sqrt(one * second[layer]) for layer, one in first.items()}

    def _error(self, layer: str, sparsity: float) -> float:
        return max(at(self._curves[layer], sparsity), LEAST)
