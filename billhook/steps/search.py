"""Search: choose allocator and knob on held-out calibration windows, never on the text that is reported.

The windows drawn from the calibration source are split in two by a seed: one half gives the statistics, the other the
loss. Cheap trials (`billhook.trials.trials`) and full runs are made as `billhook.racing.contest` says; the winner
is written as a plan and as a pruned model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.measurement.measure import measure
from billhook.plan.allocators import ALLOCATORS, allocate, check_budget
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.plan.table import Table
from billhook.racing.contest import UNIFORM, Budget, Contest
from billhook.racing.journal import MODEL, PICTURE, Journal, Run
from billhook.racing.knobs import ALL, Candidate, Space
from billhook.racing.picture import draw
from billhook.registry import hint
from billhook.reports.publishing import publish
from billhook.steps.options import split_options
from billhook.steps.record import Job, prune_step, record
from billhook.steps.request import Opened, Request, listed, open_request
from billhook.store.output import check_output
from billhook.store.record import history
from billhook.store.shards import weight_files
from billhook.store.tensor_bytes import tensor_bytes
from billhook.text.windows import Tokens
from billhook.trials.heldout import Split, split_windows, used_fields
from billhook.trials.trials import Bench, Setting

OBJECTIVES = {"kl": "kl", "ppl": "nll"}
USED = ("sparsity", "pattern", "criterion", "options", "group")
SAMPLES = 64  # half for statistics, half held out; Wanda's ranking hardly changes beyond a few windows


@dataclass(frozen=True)
class Found:
    """The result: the plan to prune with, what made it, every trial, and the full runs (uniform first).

    `output` holds the files, if any were asked for, and `model` in it the pruned winner.
    """

    plan: Plan
    best: Run
    trials: list[Run]
    full: list[Run]
    record: dict[str, Any]
    output: Path | None
    model: Path | None


def search(
    model: str | Path | PreTrainedModel,
    sparsity: float | None = None,
    *,
    allocator: str | Sequence[str] = "all",
    budget: str | int | None = None,
    objective: str = "kl",
    grid: bool = False,
    finalists: int = 1,
    output: str | Path | None = None,
    save_model: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    begin: Callable[["Task"], None] = lambda task: None,
    **fields: Any,
) -> Found:
    """Find the allocator and the knob that lose least on held-out calibration windows; the model's weights are as
    before afterwards.

    `allocator` is one name, several, or "all" (alphapruning, atp, owl, dlp); `budget` bounds the cheap trials, by
    number (9) or time ("5m"); `objective` is "kl" (divergence from the dense model) or "ppl"; `grid` tries the
    published values; `finalists` is how many of each allocator's best trials are pruned properly beside uniform;
    `output` is a directory for search.json, plan.json, search.svg, and unless not `save_model` the pruned winner,
    model/; a search that was interrupted goes on from there. `progress` is given a line for each trial, `begin` the
    checked task before anything is measured. Further keyword arguments are fields of `Request` (calibration, samples,
    length, criterion, pattern, seed, ...); `options` are the criterion's and the allocators'. Raises BillhookError for
    what cannot be done as asked, before anything is written.
    """
    limit = Budget.parse(budget)
    if finalists < 1:
        raise BillhookError("A search needs at least one finalist beside uniform.")
    if objective not in OBJECTIVES:
        raise BillhookError(
            f"Unknown objective {objective!r}.{hint(objective, OBJECTIVES)} There are: {', '.join(OBJECTIVES)}."
        )
    used_fields(fields, USED, "A search")
    request = Request(model, sparsity, **({"samples": SAMPLES} | fields))
    task = Task(request, _names(allocator), OBJECTIVES[objective], grid)
    folder = None if output is None else Path(output)
    journal = Journal.open(folder, task.identity, overwrite)
    place = folder / MODEL if folder is not None and save_model else None
    if place is not None:
        task.check_place(place)
    begin(task)
    task.check_plans()
    contest = Contest(task.space, task.bench, journal, task.objective, task.plan, progress)
    with task.bench:
        contest.try_(limit)
        best = contest.confirm(finalists)
        plan = task.plan(best.candidate)
        journal.finish(best, plan)
        if place is not None:
            task.save(plan, place)
    if folder is not None:
        draw(journal, task.objective, folder / PICTURE)
    return Found(plan, best, journal.trials, journal.full, journal.to_json(), folder, place)


def _names(allocator: str | Sequence[str]) -> tuple[str, ...]:
    """Allocators to search, each once."""
    given = allocator.split(",") if isinstance(allocator, str) else list(allocator)
    names = [n for name in given for n in (ALL if name.strip() == "all" else [name.strip()])]
    for name in names:
        ALLOCATORS.get(name)
    return tuple(name for name in dict.fromkeys(names) if name != UNIFORM.allocator)


class Task:
    """Everything about a search that is settled before the first trial: names checked, model loaded, windows split."""

    def __init__(self, request: Request, names: tuple[str, ...], objective: str, grid: bool) -> None:
        self.objective = objective
        self.target = check_budget(request.sparsity, Pattern.parse(request.pattern))
        self.request = request
        criterion_options, given = split_options(request.options, request.criterion, names)
        setting = Setting(request.criterion, criterion_options, request.group)
        self.opened = opened = open_request(request, True, "A search")
        self.split = split_windows(opened, request.seed)
        blocks = len({layer.block for layer in opened.layers})
        self.space = Space(names, given, blocks, self.target, grid)
        self.space.check()
        self.bench = Bench(opened.model, opened.layers, self.split.batches, self.split.heldout, setting)
        self.identity = _identity(request, opened, self.split, self.space, setting, objective)
        self._table: Table | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that the allocators read."""
        needs = (ALLOCATORS.needs(c.allocator, c.options) for c in self.space.candidates())
        return list(dict.fromkeys(name for names in needs for name in names))

    @property
    def table(self) -> Table:
        """What the allocators read, measured when the first plan is made."""
        if self._table is None:
            opened = self.opened
            self._table = measure(
                opened.model, self.columns, batches=self.split.batches, layers=opened.layers, facts=opened.facts
            )
        return self._table

    def plan(self, candidate: Candidate) -> Plan:
        """The candidate's plan."""
        return allocate(
            self.table, self.target, allocator=candidate.allocator, pattern=self.request.pattern, **candidate.options
        )

    def check_plans(self) -> None:
        """Raise BillhookError for a value that an allocator refuses, or a layer that cannot be measured, before the
        first trial."""
        for candidate in (UNIFORM, *self.space.candidates()):
            self.plan(candidate)

    def check_place(self, place: Path) -> None:
        """Raise BillhookError or JobError if a model could not be written to `place`, whose folder may be made yet."""
        source = self.opened.source
        needed = sum(file.stat().st_size for file in weight_files(source)) if source else 0
        check_output(place if place.parent.is_dir() else place.parent, source, overwrite=True, needed=needed)

    def save(self, plan: Plan, place: Path) -> None:
        """Write the model pruned as `plan` says, on the calibration half, to `place`, unless that is what lies
        there."""
        ids = torch.cat(self.split.batches)
        facts = self.split.facts
        half = Tokens(ids, facts["source"], facts["calibration"]["digest"], facts["sampling"])
        opened = replace(self.opened, calibration=half, batches=self.split.batches)
        job = Job(self.request, opened, plan, self.bench.setting.options)
        search = {"objective": self.objective, "heldout": facts["heldout"]}
        asked, there = prune_step(job, {}, search=search), history(place)
        if there is not None and all(
            getattr(there.steps[-1], key) == json.loads(json.dumps(getattr(asked, key)))
            for key in ("plan", "made_by", "model")
        ):
            return
        made = record(job, self.bench.prune(plan), search=search)
        save_pruned(opened.model, opened.source, place, record=made, overwrite=True, publish=publish)


def _identity(
    request: Request, opened: Opened, split: Split, space: Space, setting: Setting, objective: str
) -> dict[str, Any]:
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
        "blocks": space.blocks,
        "calibration": split.facts,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
    }


def _weights_digest(opened: Opened) -> str:
    """What identifies a model in memory: SHA-256 over its prunable weights."""
    total = hashlib.sha256()
    for layer in opened.layers:
        total.update(tensor_bytes(layer.weight.contiguous().cpu()))
    return total.hexdigest()


def summary(found: Found) -> Mapping[str, Any]:
    """The result in a few numbers, for machines."""
    place = {
        key: None if path is None else str(path) for key, path in (("output", found.output), ("model", found.model))
    }
    return {"best": found.record["best"], "trials": len(found.trials), **place}
