"""Search: choose allocator and knob on held-out calibration windows, never on the text that is reported.

The windows drawn from the calibration source are split in two by a seed: one half gives the statistics, the other the loss. Cheap
trials (`billhook.trials`) follow the schedule of `billhook.knobs`; one that is worse than the best so far by three standard
errors of the paired difference over windows is given up. The best of them and uniform are then pruned properly, and the better of
these two is the result: on the held-out windows it is never worse than uniform.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.allocators import ALLOCATORS, allocate, check_budget
from billhook.criteria import CRITERIA
from billhook.errors import BillhookError
from billhook.heldout import Split, split_windows
from billhook.journal import PICTURE, Journal, Run, loss_difference
from billhook.knobs import KNOBS, Candidate, Outcome, Space, propose
from billhook.measuring import measure
from billhook.plan import Pattern, SparsityPlan
from billhook.registry import hint
from billhook.request import Opened, Request, listed, open_request
from billhook.search_picture import draw
from billhook.table import Table
from billhook.trials import Bench, Setting

OBJECTIVES = {"kl": "kl", "ppl": "nll"}
SAMPLES = 64  # half for statistics, half held out; Wanda's ranking hardly changes beyond a few windows
_FIRST = 4  # windows before a trial can be given up; doubled from there to half of the held-out ones
_ERRORS = 3.0  # standard errors by which a trial must be worse to be given up
UNIFORM = Candidate("uniform", {})


@dataclass(frozen=True)
class Found:
    """The result: the plan to prune with, what made it, every trial, and the full runs (uniform first)."""

    plan: SparsityPlan
    best: Run
    trials: list[Run]
    full: list[Run]
    record: dict[str, Any]
    output: Path | None


def search(
    model: str | Path | PreTrainedModel,
    sparsity: float | None = None,
    *,
    allocator: str | Sequence[str] = "all",
    trials: int | None = None,
    minutes: float | None = None,
    objective: str = "kl",
    grid: bool = False,
    finalists: int = 1,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    **fields: Any,
) -> Found:
    """Find the allocator and the knob that lose least on held-out calibration windows; the model's weights are as before afterwards.

    `allocator` is one name, several, or "all" that have a knob; `trials` and `minutes` bound the cheap trials; `objective` is "kl"
    (divergence from the dense model) or "ppl"; `grid` tries the published values; `finalists` is how many of each
    allocator's best trials are pruned properly beside uniform; `output` is a directory for search.json, plan.json
    and, with matplotlib, search.svg; a search that was interrupted goes on from there. `progress` is given a line for each trial.
    Further keyword arguments are fields of `Request` (calibration, samples, length, criterion, pattern, seed, ...); `options` are the
    criterion's and the allocators'. Raises BillhookError for what cannot be done as asked, before anything is written.
    """
    if (trials is not None and trials < 1) or (minutes is not None and not minutes > 0) or finalists < 1:
        raise BillhookError("A search needs a budget: at least one trial and one finalist, and more than zero minutes.")
    if objective not in OBJECTIVES:
        raise BillhookError(f"Unknown objective {objective!r}.{hint(objective, OBJECTIVES)} There are: {', '.join(OBJECTIVES)}.")
    request = Request(model, sparsity, **({"samples": SAMPLES} | fields))
    task = Task(request, _names(allocator), OBJECTIVES[objective], grid)
    journal = Journal.open(None if output is None else Path(output), task.identity, overwrite)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        _try(task, journal, trials, deadline, progress)
        best, plan = _confirm(task, journal, finalists, progress)
    finally:
        task.bench.restore_()
    journal.finish(best, plan)
    if journal.folder is not None:
        draw(journal, task.objective, journal.folder / PICTURE)
    return Found(plan, best, journal.trials, journal.full, journal.to_json(), None if output is None else Path(output))


def _names(allocator: str | Sequence[str]) -> tuple[str, ...]:
    """Allocators to search, each once; "all" are those with a knob."""
    given = allocator.split(",") if isinstance(allocator, str) else list(allocator)
    names = [n for name in given for n in (KNOBS if name.strip() == "all" else [name.strip()])]
    for name in names:
        ALLOCATORS.get(name)
    return tuple(name for name in dict.fromkeys(names) if name != UNIFORM.allocator)


class Task:
    """Everything about a search that is settled before the first trial: names checked, model loaded, windows split."""

    def __init__(self, request: Request, names: tuple[str, ...], objective: str, grid: bool) -> None:
        self.objective = objective
        self.target = check_budget(request.sparsity, Pattern.parse(request.pattern))
        self.pattern = request.pattern
        criterion_options, given = _split_options(request, names)
        setting = Setting(request.criterion, criterion_options, request.group)
        opened = open_request(request, True, "A search")
        self.split = split_windows(opened, request.seed)
        blocks = len({layer.block for layer in opened.layers})
        self.space = Space(names, given, blocks, self.target, grid)
        self.space.check()
        self.bench = Bench(opened.model, opened.layers, self.split.batches, self.split.heldout, setting)
        self.identity = _identity(request, opened, self.split, self.space, setting, objective)
        self._opened = opened
        self._table: Table | None = None

    @property
    def table(self) -> Table:
        """What the allocators read, measured when the first plan is made."""
        if self._table is None:
            needs = (ALLOCATORS.needs(c.allocator, c.options) for c in self.space.candidates())
            columns = list(dict.fromkeys(name for names in needs for name in names))
            opened = self._opened
            self._table = measure(opened.model, columns, batches=self.split.batches, layers=opened.layers, facts=opened.facts)
        return self._table

    def plan(self, candidate: Candidate) -> SparsityPlan:
        """The candidate's plan."""
        return allocate(self.table, self.target, allocator=candidate.allocator, pattern=self.pattern, **candidate.options)


def _split_options(request: Request, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The criterion's configured options and, as given, those of the allocators; raises BillhookError for one that nobody has."""
    of_criterion = CRITERIA.options(request.criterion)
    of_allocators = {key for name in names for key in ALLOCATORS.options(name)}
    for key in request.options:
        if key not in of_criterion and key not in of_allocators:
            known = [*of_criterion, *sorted(of_allocators)]
            raise BillhookError(f"No method in this search has an option {key!r}.{hint(key, known)} Options: {', '.join(known) or 'none'}.")
    given = {key: value for key, value in request.options.items() if key in of_allocators}
    return CRITERIA.configure(request.criterion, {k: v for k, v in request.options.items() if k in of_criterion}), given


def _identity(request: Request, opened: Opened, split: Split, space: Space, setting: Setting, objective: str) -> dict[str, Any]:
    """What a search.json must agree in to be continued."""
    model = dict(opened.facts)
    if opened.source is None:
        model["digest"] = _weights_digest(opened)
    return {
        "model": model,
        "targets": listed(request.targets),
        "ignore": listed(request.ignore),
        "sparsity": space.target,
        "pattern": request.pattern,
        "criterion": setting.criterion,
        "criterion_options": setting.options,
        "proxy": setting.proxy[0],
        "group": setting.group,
        "allocators": list(space.allocators),
        "options": dict(space.given),
        "objective": objective,
        "grid": space.grid,
        "calibration": split.facts,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
    }


def _weights_digest(opened: Opened) -> str:
    """What identifies a model in memory: SHA-256 over its prunable weights."""
    total = hashlib.sha256()
    for layer in opened.layers:
        total.update(layer.weight.contiguous().cpu().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _try(task: Task, journal: Journal, trials: int | None, deadline: float | None, progress: Callable[[str], None]) -> None:
    """Make cheap trials until the schedule or the budget ends; the first, which does not count, is uniform."""
    if not journal.trials:
        _one(task, journal, UNIFORM, progress)
    limit = task.space.points if trials is None else trials
    while len(journal.trials) <= limit and (deadline is None or time.monotonic() < deadline or len(journal.trials) < 2):
        candidate = propose(task.space, _outcomes(journal, task.objective))
        if candidate is None:
            return
        _one(task, journal, candidate, progress)


def _outcomes(journal: Journal, objective: str) -> list[Outcome]:
    """Past trials for the schedule: their scores, and whether each is clearly behind the best by now."""
    uniform, best = journal.trials[0], _best(journal, objective)
    scores = [loss_difference(t, uniform, objective)[0] for t in journal.trials[1:]]
    return [Outcome(t.candidate, s, t.stopped or _behind(t, best, objective)) for t, s in zip(journal.trials[1:], scores, strict=True)]


def _best(journal: Journal, objective: str) -> Run:
    """The trial of least loss among those that ran to the end, uniform among them."""
    return min((t for t in journal.trials if not t.stopped), key=lambda t: t.loss(objective))


def _behind(run: Run, best: Run, objective: str) -> bool:
    difference, error = loss_difference(run, best, objective)
    return difference > _ERRORS * error


def _one(task: Task, journal: Journal, candidate: Candidate, progress: Callable[[str], None]) -> None:
    """Try one candidate on a growing number of windows, against the best that ran to the end."""
    plan = task.plan(candidate)
    best = _best(journal, task.objective) if journal.trials and not task.space.grid else None
    task.bench.trial(plan)
    last = max(min(_FIRST, len(task.split.heldout)), len(task.split.heldout) // 2)
    run = Run(candidate, [], [], False)
    while not run.stopped and len(run.kl) < last:
        done = len(run.kl)
        losses = task.bench.losses(done, min(max(2 * done, _FIRST), last))
        run = replace(run, kl=run.kl + losses.kl, nll=run.nll + losses.nll)
        if best is not None and len(run.kl) < last:
            run = replace(run, stopped=_behind(run, best, task.objective))
    journal.add_trial(run)
    progress(_line("trial", run, journal.trials[0], task.objective))


def _finalists(journal: Journal, objective: str, each: int) -> list[Candidate]:
    """Uniform, and of every allocator its `each` best trials that ran to the end and are not clearly behind."""
    best = _best(journal, objective)
    chosen = [UNIFORM]
    for name in dict.fromkeys(t.candidate.allocator for t in journal.trials[1:]):
        rivals = [t for t in journal.trials if t.candidate.allocator == name and not t.stopped and not _behind(t, best, objective)]
        chosen += [t.candidate for t in sorted(rivals, key=lambda t: t.loss(objective))[:each]]
    return chosen


def _confirm(task: Task, journal: Journal, finalists: int, progress: Callable[[str], None]) -> tuple[Run, SparsityPlan]:
    """Prune uniformly and with the best trials, block by block, and return the best on all held-out windows."""
    runs = [_full(task, journal, candidate, progress) for candidate in _finalists(journal, task.objective, finalists)]
    best = min(runs, key=lambda r: r.loss(task.objective))
    return best, task.plan(best.candidate)


def _full(task: Task, journal: Journal, candidate: Candidate, progress: Callable[[str], None]) -> Run:
    """The candidate's full run, made unless it was made before."""
    for run in journal.full:
        if run.candidate == candidate:
            return run
    plan = task.plan(candidate)
    task.bench.prune(plan)
    losses = task.bench.losses(0, len(task.split.heldout))
    run = Run(candidate, losses.kl, losses.nll, False)
    journal.add_full(run)
    progress(_line("full run", run, journal.full[0], task.objective))
    return run


def _line(what: str, run: Run, uniform: Run, objective: str) -> str:
    """What a person is shown about a run."""
    options = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in run.candidate.options.items())
    difference, error = loss_difference(run, uniform, objective)
    against = "" if run is uniform else f", {difference:+.4f} +- {error:.4f} against uniform"
    end = f", given up after {len(run.kl)} windows" if run.stopped else ""
    return f"{what} {run.candidate.allocator} {options or '-'}: kl {run.loss('kl'):.4f}, nll {run.loss('nll'):.4f}{against}{end}"


def summary(found: Found) -> Mapping[str, Any]:
    """The result in a few numbers, for machines."""
    return {"best": found.record["best"], "trials": len(found.trials), "output": None if found.output is None else str(found.output)}
