"""The runs of a search: which candidate is tried next, when one is given up, and which of the best is confirmed by full
runs.

The first cheap trial is uniform's; the others follow the schedule of `billhook.racing.knobs`. A trial is scored on a
quarter of the held-out windows, beginning with four; one that is worse than the best so far by two standard errors of
the paired difference is given up. Uniform and the best of each allocator are then pruned properly and scored on all
held-out windows, and the better of these is the result: it is never worse than uniform there.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from billhook.errors import BillhookError
from billhook.plan.plan import Plan
from billhook.racing.journal import Journal, Run, loss_difference
from billhook.racing.knobs import Candidate, Outcome, Space, propose
from billhook.trials.trials import Bench

UNIFORM = Candidate("uniform", {})
FIRST = 4  # windows before a trial can be given up; doubled from there to its share of the held-out ones
_ERRORS = 2.0  # standard errors by which a trial must be worse to be given up


@dataclass(frozen=True)
class Budget:
    """How many cheap trials may be made beside uniform's, or for how many seconds; None is no limit but the
    schedule's."""

    trials: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, given: str | int | None) -> "Budget":
        """Read trials (9, "9") or minutes ("5m"); raises BillhookError for anything else, and for nothing at all
        ("0")."""
        if given is None:
            return cls()
        found = re.fullmatch(r"(\d+|\d*\.\d+m|\d+m)", str(given).strip())
        if found is None or isinstance(given, bool):
            raise BillhookError(
                f"The budget {given!r} is neither a number of trials, such as 9, nor of minutes, such as 5m."
            )
        minutes = found[0].endswith("m")
        if float(found[0].rstrip("m")) == 0:
            raise BillhookError(
                "A budget of zero finds nothing: give at least one trial (--budget 1), or some minutes (--budget 5m)."
            )
        return cls(seconds=60 * float(found[0][:-1])) if minutes else cls(trials=int(found[0]))


def trial_windows(heldout: int) -> int:
    """How many of the held-out windows a trial that is not given up is scored on."""
    return max(min(FIRST, heldout), heldout // 4)


@dataclass(frozen=True)
class Contest:
    """What the runs share. `objective` is "kl" or "nll"; `plan` makes a candidate's plan; `progress` is given a line
    for each run."""

    space: Space
    bench: Bench
    journal: Journal
    objective: str
    plan: Callable[[Candidate], Plan]
    progress: Callable[[str], None] = lambda line: None

    def try_(self, budget: Budget) -> None:
        """Make cheap trials until the schedule or the budget ends; uniform's does not count, and one more is always
        made."""
        deadline = None if budget.seconds is None else time.monotonic() + budget.seconds
        if not self.journal.trials:
            self._trial(UNIFORM)
        limit = self.space.points if budget.trials is None else budget.trials
        while len(self.journal.trials) <= limit and (
            deadline is None or time.monotonic() < deadline or len(self.journal.trials) < 2
        ):
            candidate = propose(self.space, self._outcomes())
            if candidate is None:
                return
            self._trial(candidate)

    def confirm(self, finalists: int) -> Run:
        """Prune uniformly and with the best trials, block by block; return the best on all held-out windows."""
        return min(
            [self._full(candidate) for candidate in self._finalists(finalists)],
            key=lambda run: run.loss(self.objective),
        )

    def _outcomes(self) -> list[Outcome]:
        """Past trials for the schedule: their scores, and whether each is clearly behind the best by now."""
        uniform, best = self.journal.trials[0], self._best()
        past = self.journal.trials[1:]
        return [
            Outcome(t.candidate, loss_difference(t, uniform, self.objective)[0], t.stopped or self._behind(t, best))
            for t in past
        ]

    def _best(self) -> Run:
        """The trial of least loss among those that ran to the end, uniform among them."""
        return min((t for t in self.journal.trials if not t.stopped), key=lambda t: t.loss(self.objective))

    def _behind(self, run: Run, best: Run) -> bool:
        difference, error = loss_difference(run, best, self.objective)
        return difference > _ERRORS * error

    def _trial(self, candidate: Candidate) -> None:
        """Try one candidate on a growing number of windows, against the best that ran to the end."""
        best = self._best() if self.journal.trials and not self.space.grid else None
        self.bench.trial(self.plan(candidate))
        last = trial_windows(len(self.bench.heldout))
        run = Run(candidate, [], [], False)
        while not run.stopped and len(run.kl) < last:
            done = len(run.kl)
            losses = self.bench.losses(done, min(max(2 * done, FIRST), last))
            run = replace(run, kl=run.kl + losses.kl, nll=run.nll + losses.nll)
            if best is not None and len(run.kl) < last:
                run = replace(run, stopped=self._behind(run, best))
        self.journal.add_trial(run)
        self.progress(self._line("trial", run, self.journal.trials[0]))

    def _finalists(self, each: int) -> list[Candidate]:
        """Uniform, and of every allocator its `each` best trials that ran to the end and are not clearly behind."""
        best = self._best()
        chosen = [UNIFORM]
        for name in dict.fromkeys(t.candidate.allocator for t in self.journal.trials[1:]):
            rivals = [
                t
                for t in self.journal.trials
                if t.candidate.allocator == name and not t.stopped and not self._behind(t, best)
            ]
            chosen += [t.candidate for t in sorted(rivals, key=lambda t: t.loss(self.objective))[:each]]
        return chosen

    def _full(self, candidate: Candidate) -> Run:
        """The candidate's full run, made unless it was made before."""
        for run in self.journal.full:
            if run.candidate == candidate:
                return run
        self.bench.prune(self.plan(candidate))
        losses = self.bench.losses(0, len(self.bench.heldout))
        run = Run(candidate, losses.kl, losses.nll, False)
        self.journal.add_full(run)
        self.progress(self._line("full run", run, self.journal.full[0]))
        return run

    def _line(self, what: str, run: Run, uniform: Run) -> str:
        """What a person is shown about a run."""
        options = ", ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in run.candidate.options.items()
        )
        difference, error = loss_difference(run, uniform, self.objective)
        against = "" if run is uniform else f", {difference:+.4f} +- {error:.4f} against uniform"
        end = f", given up after {len(run.kl)} windows" if run.stopped else ""
        losses = f"kl {run.loss('kl'):.4f}, nll {run.loss('nll'):.4f}"
        return f"{what} {run.candidate.allocator} {options or '-'}: {losses}{against}{end}"
