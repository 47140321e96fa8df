"""Auto: several allocations are tried in full on held-out calibration windows, and the best is used.

`billhook prune --allocator auto` races candidates, each pruned with the run's own criterion (admm in three steps,
unless `steps` is given) on half of the calibration windows, and scored by KL divergence from the dense model on the
other half:

1. uniform. Each layer's share of its divergence is measured by one backward pass (`billhook.trials.attribution`).
2. `curves`: the optimum of the measured error curves with these shares, which are measured again under this plan.
3. Further rounds: the optimum with the geometric mean of all shares so far, because shares change with the plan. A
   layer that a plan hardly prunes does not contribute to that plan's shares. Rounds go on while they reduce the
   held-out loss, up to four.

The same race chooses a hyperparameter that is given as `auto`, such as `--allocator atp --set beta=auto`. Uniform is
always among the candidates, so the plan is never worse than uniform on the held-out windows. If the text is too short
to be split, the plan is uniform and its record says why.

Measured: KL divergence from the dense model on text that was used for nothing else, relative to uniform's, three small
models at 60 and 70 %, 32 calibration windows of 256 tokens: 0.32 to 0.89 with Wanda (17 runs, three seeds), 0.18 to
0.98 with admm (6 runs). A search over AlphaPruning, ATP, OWL and DLP ended at a larger divergence in every run that
both made.

Cost: a prune and a backward pass for each of three to five candidates: 2.9 to 4.4 prunes with admm, 4.4 to 10.5 with
Wanda, whose prunes are short. The model and a copy of its prunable weights must fit in memory.

Limits: `billhook plan` has no model to try plans on; it offers `curves` instead.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.method import Method
from billhook.errors import BillhookError
from billhook.measurement.error_curves import cheaper
from billhook.plan.allocators import AUTO, RCO
from billhook.plan.allocators.curves import LEAST, MIDDLE, at
from billhook.plan.plan import Plan
from billhook.racing.hyperparameters import Space
from billhook.racing.race import AllocationProblem, Candidate, Race
from billhook.racing.sparsities import by_descent
from billhook.tasks.base import Samples
from billhook.trials.attribution import FLOOR
from billhook.trials.heldout import split_samples
from billhook.trials.trials import TrialRunner

Shares = Mapping[str, float]
ROUNDS = 4  # of curves


def needs(allocator: str, criterion: str) -> tuple[str, ...]:
    """The columns that `auto` reads, or another allocator that needs the model: none."""
    return (f"error_curve:{criterion}",) if allocator == AUTO else ()


def trial_method(method: Method, layers: Sequence[Layer]) -> Method:
    """How trials prune: as the run, but cheaper, except for the options that were given."""
    given = {name: value for name, value in method.options.items() if value is not None}
    return replace(method, options={**cheaper(method.criterion, layers), **given})


def choose(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    samples: Samples,
    problem: AllocationProblem,
    method: Method,
    *,
    allocator: str = AUTO,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The best plan on the held-out half of `samples`; the model's weights are restored.

    `allocator` is `auto`, `rco`, or one whose hyperparameter is to be chosen, with its other `options`. The problem's
    table has the columns that these read; `method` is how the run prunes, and `seed` splits the samples.
    """
    uniform = problem.allocate("uniform", {})
    try:
        split = split_samples(model, samples, batch_size, seed)
    except BillhookError as error:
        return replace(uniform, made_by={**uniform.made_by, "racing": {"reason": f"uniform without a race: {error}"}})
    given = {key: value for key, value in (options or {}).items() if value != AUTO}
    with TrialRunner(model, layers, split.batches, split.heldout, trial_method(method, layers)) as runner:
        race = Race(runner, progress=progress)
        if allocator == RCO:
            found = by_descent(runner, problem, given, progress)
            race.run(lambda race: iter([Candidate("uniform", uniform), Candidate(RCO, found)]))
        else:
            space = Space((allocator,), given, len(problem.table.blocks()), uniform.target)
            race.run(lambda race: schedule(space, problem, method.criterion, race))
    return race.result({"heldout": split.facts["heldout"]})


def schedule(space: Space, problem: AllocationProblem, criterion: str, race: Race) -> Iterator[Candidate]:
    """The candidates of `auto`, if it is among the allocators, and those of the others."""
    if AUTO in space.allocators:
        yield from rounds(ErrorCurves(problem, criterion), race)
    yield from space.schedule(problem, race)


def rounds(curves: "ErrorCurves", race: Race) -> Iterator[Candidate]:
    """Uniform, and the optimum of the curves with shares that are measured again under every plan."""
    yield Candidate("uniform", curves.uniform, attribute=True)
    shares = [curves.shares(race, "uniform")]
    for number in range(1, ROUNDS + 1):
        name = "curves" if number == 1 else f"curves, round {number}"
        yield Candidate(name, curves.optimum(curves.mean(shares)), attribute=number < ROUNDS)
        trial = race.trials[name]
        if trial.dropped or (number > 1 and race.best is not trial):
            break
        shares.append(curves.shares(race, name))


class ErrorCurves:
    """Plans from the error curves of the problem's table and given shares."""

    def __init__(self, problem: AllocationProblem, criterion: str) -> None:
        self.problem, self.criterion = problem, criterion
        self.uniform = problem.allocate("uniform", {})
        curves = problem.table.curve(f"error_curve:{criterion}")
        self._curves = dict(zip(problem.table.shapes, curves, strict=True))

    def optimum(self, shares: Shares, strength: float = 1.0) -> Plan:
        """The plan of `curves`, or the part `strength` of the way to it from uniform."""
        table, column = self.problem.table, f"loss_share:{self.criterion}"
        rows = tuple(replace(row, metrics={**row.metrics, column: shares[row.layer]}) for row in table)
        problem = replace(self.problem, table=replace(table, rows=rows))
        return problem.allocate("curves", {"criterion": self.criterion, "strength": strength})

    def shares(self, race: Race, name: str) -> Shares:
        """The shares measured in a trial, as they would be if every layer's sparsity were `MIDDLE`.

        Without the layers that the trial's plan prunes so little that their share is below what can be measured
        (`FLOOR`): at `MIDDLE` that would be any number.
        """
        sparsity, uniform = self.removed(race.plans[name]), self.removed(self.uniform)
        found = {}
        for layer, share in race.trials[name].shares.items():
            error = self._error(layer, sparsity[layer])
            if error >= FLOOR * self._error(layer, uniform[layer]):
                found[layer] = share * self._error(layer, MIDDLE) / error
        return found

    def removed(self, plan: Plan) -> Mapping[str, float]:
        """The fraction that a plan removes of each layer."""
        return plan.sparsity

    def mean(self, several: Sequence[Shares]) -> Shares:
        """The geometric mean of the shares measured in several trials, for each layer over those that have it."""
        logs = {layer: [math.log(shares[layer]) for shares in several if layer in shares] for layer in several[0]}
        return {layer: math.exp(math.fsum(values) / len(values)) for layer, values in logs.items()}

    def _error(self, layer: str, sparsity: float) -> float:
        return max(at(self._curves[layer], sparsity), LEAST)
