"""The race: candidates are pruned in full one after the other, and scored on a growing number of held-out windows.

A candidate is first scored on `FIRST` windows, then on twice as many, and so on. It is dropped as soon as it is clearly
behind the best so far: by more than two standard errors of the difference paired over windows (Maron & Moore 1993,
"Hoeffding races"). The first candidate is the uniform plan and the result the best of those scored on all windows, so
it is never worse than uniform there. Deterministic, unless the budget is of time.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from billhook.engine.batch import rows_of
from billhook.errors import BillhookError
from billhook.evaluation.divergence import KL
from billhook.plan.allocators import ALLOCATORS, BudgetScope, allocate
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.trials.trials import Runner

FIRST = 4  # windows
ERRORS = 2.0  # standard errors
Objective = Literal["kl", "nll"]


@dataclass(frozen=True)
class Candidate:
    """A plan to try, under a name; `attribute` asks for each layer's share of its divergence, too."""

    name: str
    plan: Plan
    attribute: bool = False


@dataclass(frozen=True)
class AllocationProblem:
    """What plans are made from: the measured table, the sparsity to reach (None: the pattern's), the pattern, and
    whether each stack of blocks meets the sparsity or all share it."""

    table: Table
    sparsity: float | None
    pattern: str = "unstructured"
    budget: BudgetScope = "each"

    def allocate(self, allocator: str, options: Mapping[str, Any]) -> Plan:
        """The plan of an allocator."""
        return allocate(
            self.table, self.sparsity, allocator=allocator, pattern=self.pattern, budget=self.budget, **options
        )

    def candidate(self, allocator: str, options: Mapping[str, Any]) -> Candidate:
        """The plan of an allocator, named after it, its numbers, and its other options that are not the defaults."""
        defaults = ALLOCATORS.configure(allocator, {})
        shown = [(k, v) for k, v in options.items() if isinstance(v, float) or v != defaults[k]]
        words = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown]
        return Candidate(" ".join([allocator, *words]), self.allocate(allocator, options))


@dataclass(frozen=True)
class Trial:
    """A candidate that was pruned and scored on held-out windows: an entry of `trials` in search.json.

    * `name`: its name in the race.
    * `allocator`: name of its allocator.
    * `options.*` (any): the allocator's options.
    * `kl`: KL divergence from the dense model on each window (in nats per token of it), image or answer; of embeddings
      1 - cosine. The first ones only if `dropped`.
    * `nll`: negative log-likelihood on each, in the same unit; 0 where there are no labels.
    * `dropped`: whether it was given up before all windows.
    * `shares.*` (number): the layers' shares of the divergence, if they were asked for.
    """

    name: str
    allocator: str
    options: dict[str, Any]
    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    dropped: bool = False
    shares: dict[str, float] = field(default_factory=dict)

    def loss(self, objective: Objective) -> float:
        """The mean over windows."""
        return statistics.fmean(getattr(self, objective))


def paired_difference(a: Trial, b: Trial, objective: Objective) -> tuple[float, float]:
    """Mean and standard error of a's loss minus b's, over the windows on which both were scored."""
    found = [x - y for x, y in zip(getattr(a, objective), getattr(b, objective), strict=False)]
    return statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.inf


@dataclass(frozen=True)
class TrialBudget:
    """The largest number of trials beside uniform's, and of seconds for them."""

    trials: float = math.inf
    seconds: float = math.inf

    @classmethod
    def parse(cls, given: str | int | None) -> "TrialBudget":
        """Read trials (9, "9") or minutes ("5m"); raises BillhookError for anything else, and for zero."""
        if given is None:
            return cls()
        found = re.fullmatch(r"(\d+|\d*\.\d+(?=m))(m?)", str(given).strip())
        if found is None or isinstance(given, bool):
            raise BillhookError(
                f"The budget {given!r} is neither a number of trials, such as 9, nor of minutes, such as 5m."
            )
        if float(found[1]) == 0:
            raise BillhookError(
                "A budget of zero finds nothing: give at least one trial (--budget 1), or some minutes (--budget 5m)."
            )
        return cls(seconds=60 * float(found[1])) if found[2] else cls(trials=int(found[1]))


@dataclass
class Race:
    """The trials so far, by name, in order, uniform's first. `known` are trials of an interrupted race, which are not
    made again; `save` is called after every new trial, `progress` with a line about it."""

    runner: Runner
    objective: Objective = "kl"
    known: Mapping[str, Trial] = field(default_factory=dict)
    save: Callable[["Race"], Any] = lambda race: None
    progress: Callable[[str], None] = lambda line: None
    trials: dict[str, Trial] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The least mean loss among those scored on all windows; of equal ones the first."""
        return min((t for t in self.trials.values() if not t.dropped), key=lambda t: t.loss(self.objective))

    def behind(self, trial: Trial) -> bool:
        """Whether a trial is clearly worse than the best so far."""
        difference, error = paired_difference(trial, self.best, self.objective)
        return difference > ERRORS * error

    def against_uniform(self, trial: Trial) -> tuple[float, float]:
        """The paired difference from uniform."""
        return paired_difference(trial, self.trials["uniform"], self.objective)

    def run(self, schedule: "Schedule", budget: TrialBudget | None = None) -> None:
        """Try the candidates of the schedule until it or the budget ends, but at least one beside uniform."""
        budget, start = budget or TrialBudget(), time.monotonic()
        for candidate in schedule(self):
            name = candidate.name
            if name in self.trials:
                continue
            spent = len(self.trials) > budget.trials or time.monotonic() > start + budget.seconds
            if spent and len(self.trials) > 1 and name not in self.known:
                break
            self.plans[name] = candidate.plan
            known, made_by = self.known.get(name), candidate.plan.made_by
            if known is None:
                self.trials[name] = self._try(candidate)
            else:
                self.trials[name] = replace(known, allocator=made_by["allocator"], options=made_by["options"])
            if name not in self.known:
                self.save(self)
                self.progress(self._line(self.trials[name]))

    def result(self, facts: Mapping[str, Any]) -> Plan:
        """The best plan; `made_by.racing` says what was tried, with the mean loss of each, and `facts`."""
        tried = {name: trial.loss(self.objective) for name, trial in self.trials.items()}
        dropped = [name for name, trial in self.trials.items() if trial.dropped]
        plan = self.plans[self.best.name]
        racing = {"objective": self.objective, "best": self.best.name, "tried": tried, "dropped": dropped, **facts}
        return replace(plan, made_by={**plan.made_by, "racing": racing})

    def _try(self, candidate: Candidate) -> Trial:
        made_by, runner = candidate.plan.made_by, self.runner
        runner.prune(candidate.plan)
        trial, windows = Trial(candidate.name, made_by["allocator"], made_by["options"]), rows_of(runner.heldout)
        while (done := len(trial.kl)) < windows and not trial.dropped:
            more = runner.losses(done, min(max(2 * done, FIRST), windows))
            trial = replace(trial, kl=trial.kl + more.kl, nll=trial.nll + more.nll)
            trial = replace(trial, dropped=bool(self.trials) and len(trial.kl) < windows and self.behind(trial))
        return replace(trial, shares=runner.attribute()) if candidate.attribute and not trial.dropped else trial

    def _line(self, trial: Trial) -> str:
        difference, error = self.against_uniform(trial)
        against = f", {difference:+.4f} +- {error:.4f} against uniform" if len(self.trials) > 1 else ""
        task, nll = self.runner.task, f", nll {trial.loss('nll'):.4f}"
        name, nll = ("kl", nll) if task.divergence is KL else (task.divergence.name, "")
        dropped = f", dropped after {len(trial.kl)} windows" if trial.dropped else ""
        return f"{trial.name}: {name} {trial.loss('kl'):.4f}{nll}{against}{dropped}"


Schedule = Callable[[Race], Iterator[Candidate]]
