"""Search: race allocators and their hyperparameters on held-out calibration windows, then prune with the winner.

The windows drawn from the calibration source are split in two by a seed: on one half the trials are pruned, on the
other they are scored (`billhook.racing`); the winner is pruned with all of them. Text that is evaluated later is never
read.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.engine.restore import restored
from billhook.errors import BillhookError
from billhook.measurement.measure import measure
from billhook.plan.allocators import ALLOCATORS, AUTO, check_budget
from billhook.plan.plan import Pattern, SparsityPlan
from billhook.racing.automatic import needs, schedule, trial_setting
from billhook.racing.hyperparameters import ALL, Space
from billhook.racing.picture import draw
from billhook.racing.race import Budget, Objective, Problem, Race, Trial
from billhook.racing.record import MODEL, PICTURE, PLAN, SearchRecord
from billhook.registry import hint
from billhook.steps.options import split_options
from billhook.steps.prune import run
from billhook.steps.record import Job
from billhook.steps.request import Opened, Request, listed, open_request
from billhook.store.output import check_output
from billhook.store.shards import weight_files
from billhook.store.tensor_bytes import tensor_bytes
from billhook.trials.heldout import split_windows
from billhook.trials.trials import Setting, TrialRunner

OBJECTIVES: dict[str, Objective] = {"kl": "kl", "ppl": "nll"}
USED = {"model", "sparsity", "pattern", "criterion", "options", "group", "calibration", "samples", "length", "seed"}
USED |= {"batch_size", "targets", "ignore", "device", "dtype", "trust_remote_code"}
SAMPLES = 64  # half of them for pruning, half held out


@dataclass(frozen=True)
class Found:
    """The result: the plan, the winner's trial, all trials (uniform first), the content of search.json, and where the
    files and the pruned model are, if they were asked for."""

    plan: SparsityPlan
    best: Trial
    trials: list[Trial]
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
    output: str | Path | None = None,
    save_model: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    begin: Callable[[int], None] = lambda trials: None,
    **fields: Any,
) -> Found:
    """Find the allocator and the hyperparameter that lose least on held-out calibration windows.

    `allocator` is one name, several, or "all" (alphapruning, atp, owl, dlp); "auto" adds the candidates of `--allocator
    auto`. `budget` limits the trials beside uniform's, by number (9) or time ("5m"); `objective` is "kl" (divergence
    from the dense model) or "ppl"; `grid` tries the published values. `output` is a directory for search.json,
    plan.json, search.svg and, unless not `save_model`, the pruned winner, model/; an interrupted search is continued
    there. `progress` is called with a line for each trial, `begin` with how many there are at most, apart from those of
    `auto`, before the first. Further keyword arguments are fields of `Request` (`USED`). The model's weights are
    restored. Raises BillhookError for what cannot be done as asked, before anything is written.
    """
    limit = Budget.parse(budget)
    _check(objective, fields)
    request = Request(model, sparsity, **({"samples": SAMPLES} | fields))
    names, target = _names(allocator), check_budget(sparsity, Pattern.parse(request.pattern))
    options, given = split_options(request.options, request.criterion, [name for name in names if name != AUTO])
    setting = Setting(request.criterion, options, request.group)
    opened = open_request(request, True, "A search")
    assert opened.calibration is not None
    split = split_windows(opened.calibration, len(opened.batches[0]), request.seed)
    space = Space(names, given, len({layer.block for layer in opened.layers}), target, grid)
    folder, place = _places(opened, output, save_model)
    identity = _identity(request, opened, space, setting) | {"objective": objective, "calibration": split.facts}
    record = SearchRecord.open(folder, identity, overwrite)
    problem = _problem(request, opened, space, split.batches)
    begin(int(min(limit.trials, space.most())))
    trials = trial_setting(setting, opened.layers)
    with TrialRunner(opened.model, opened.layers, split.batches, split.heldout, trials) as runner:
        race = Race(runner, OBJECTIVES[objective], record.known, record.write, progress)
        race.run(lambda race: schedule(space, problem, request.criterion, race), limit)
    plan = race.result({"heldout": split.facts["heldout"]})
    pruned = record.pruned and race.trials.keys() == record.known.keys()
    found = record.write(race, ended=True, pruned=pruned)
    if folder is not None:
        plan.save(folder / PLAN)
        draw(race, space, f"Trials at sparsity {target:g} with {request.criterion}", folder / PICTURE)
    if place is not None and not pruned:
        with restored(opened.layers):
            run(Job(replace(request, output=place, overwrite=True), opened, plan, options))
        found = record.write(race, ended=True, pruned=True)
    return Found(plan, race.best, list(race.trials.values()), found, folder, place)


def _check(objective: str, fields: Mapping[str, Any]) -> None:
    """Raise BillhookError for an unknown objective, or a field that a search does not use."""
    if objective not in OBJECTIVES:
        raise BillhookError(
            f"Unknown objective {objective!r}.{hint(objective, OBJECTIVES)} There are: {', '.join(OBJECTIVES)}."
        )
    for name in fields.keys() - USED:
        raise BillhookError(f"A search has no use for {name!r}: leave it out.{hint(name, USED)}")


def _names(allocator: str | Sequence[str]) -> tuple[str, ...]:
    """The allocators to race against uniform, each once."""
    given = allocator.split(",") if isinstance(allocator, str) else list(allocator)
    names = [n for name in given for n in (ALL if name.strip() == "all" else [name.strip()])]
    for name in names:
        if name != AUTO:
            ALLOCATORS.check(name)
    return tuple(name for name in dict.fromkeys(names) if name != "uniform")


def _places(opened: Opened, output: str | Path | None, save_model: bool) -> tuple[Path | None, Path | None]:
    """Where the search and the pruned model go; raises BillhookError or JobError if no model could be written there."""
    folder, source = None if output is None else Path(output), opened.source
    if folder is None or not save_model:
        return folder, None
    needed = sum(file.stat().st_size for file in weight_files(source)) if source else 0
    check_output(folder / MODEL if folder.is_dir() else folder, source, overwrite=True, needed=needed)
    return folder, folder / MODEL


def _problem(request: Request, opened: Opened, space: Space, batches: Sequence[Any]) -> Problem:
    """Measure what the allocators read; raises BillhookError for a value that an allocator refuses."""
    columns = [*(needs(request.criterion) if AUTO in space.allocators else ()), *space.columns()]
    table = measure(opened.model, columns, batches=batches, layers=opened.layers, facts=opened.facts)
    problem = Problem(table, request.sparsity, request.pattern)
    for name, options in space.first():
        problem.allocate(name, options)
    return problem


def _identity(request: Request, opened: Opened, space: Space, setting: Setting) -> dict[str, Any]:
    """What a search.json must agree in to be continued; a model in memory is identified by its prunable weights."""
    model = dict(opened.facts)
    if opened.source is None:
        weights = hashlib.sha256()
        for layer in opened.layers:
            weights.update(tensor_bytes(layer.weight.contiguous().cpu()))
        model["digest"] = weights.hexdigest()
    return {
        "model": model,
        "targets": listed(request.targets),
        "ignore": listed(request.ignore),
        "sparsity": space.target,
        "pattern": request.pattern,
        "criterion": setting.criterion,
        "criterion_options": setting.options,
        "group": setting.group,
        "allocators": list(space.allocators),
        "options": dict(space.given),
        "grid": space.grid,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
    }
