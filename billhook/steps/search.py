"""Race allocators and their hyperparameters on held-out calibration windows, then prune with the winner.

The calibration windows are split in two halves by a seed: trials are pruned with one half and scored on the other
(`billhook.racing`); the winner is pruned with all windows. Evaluation text is never read.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel

from billhook.ambient import pinned
from billhook.engine.batch import LABELS, Batch, rows_of
from billhook.engine.method import Method
from billhook.engine.restore import restored
from billhook.errors import BillhookError
from billhook.evaluation.divergence import KL
from billhook.evaluation.scoring import each
from billhook.images.labels import UNKNOWN
from billhook.measurement.measure import measure
from billhook.plan.allocators import ALLOCATORS, AUTO, RCO, check_budget
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.racing.automatic import ROUNDS, needs, schedule, trial_method
from billhook.racing.hyperparameters import RACED, Space, every
from billhook.racing.picture import draw
from billhook.racing.race import AllocationProblem, Objective, Race, Trial, TrialBudget
from billhook.racing.record import MODEL, PICTURE, PLAN, SearchRecord
from billhook.registry import hint
from billhook.steps.gradients import check_temporary_room, gradient_bytes
from billhook.steps.keywords import SearchFields
from billhook.steps.options import split_options
from billhook.steps.prune import run
from billhook.steps.prune_job import Job, PruneRequest
from billhook.steps.request import Opened, check_stays, open_request
from billhook.store.compute import dtype_name
from billhook.store.output import absolute, check_output
from billhook.store.shards import weight_bytes
from billhook.store.sinks import choose_sink
from billhook.store.tensor_bytes import tensor_bytes
from billhook.tasks.base import Task
from billhook.trials.heldout import split_samples
from billhook.trials.trials import TrialRunner

OBJECTIVES: dict[str, Objective] = {"kl": "kl", "ppl": "nll"}
SAMPLES = 64  # half of them for pruning, half held out


@dataclass(frozen=True)
class Found:
    """The plan, the winner's trial, all trials (uniform first), the content of search.json, and the directories of the
    search and of the pruned model, if written; `loss` says what the winner has lost, in words."""

    plan: Plan
    best: Trial
    trials: list[Trial]
    record: dict[str, Any]
    output: Path | None
    model: Path | None
    loss: str


@pinned
def search(
    model: str | Path | PreTrainedModel,
    sparsity: float | None = None,
    *,
    allocator: str | Sequence[str] = RACED,
    budget: str | int | None = None,
    objective: str = "kl",
    grid: bool = False,
    output: str | Path | None = None,
    save_model: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    **fields: Unpack[SearchFields],
) -> Found:
    """Find the allocator and the hyperparameter with the lowest loss on held-out calibration windows.

    * `allocator`: names, or "all"; "auto" stands for the candidates that `prune` tries for this allocator.
    * `budget`: the number of trials in addition to uniform (9), or their time ("5m").
    * `objective`: "kl" (divergence from the dense model) or "ppl". `grid` tries the published values.
    * `output`: a directory for search.json, plan.json, search.svg and, if `save_model`, the pruned model/; an
      interrupted search is continued there.
    * `progress`: called with the largest number of trials, in words, and then with a line for each trial.
    * `fields`: of `PruneRequest`, those that `SearchFields` names.

    The model's weights are restored. Raises BillhookError for an impossible request, before anything is written.
    """
    limit = TrialBudget.parse(budget)
    _check(objective, fields)
    request = PruneRequest(model, sparsity, **({"samples": SAMPLES} | fields))
    if request.allocator not in ("uniform", AUTO):
        raise BillhookError(f"A search chooses the allocation: give allocator {request.allocator}, not the recipe.")
    names, target = _names(allocator), check_budget(sparsity, Pattern.parse(request.pattern))
    options, given = split_options(request.options, request.criterion, [name for name in names if name != AUTO])
    method = Method(request.criterion, options, request.group, prefix=request.prefix or "pruned")
    if output is not None and save_model:
        check_stays(request.calibration, absolute(Path(output) / MODEL))
    opened = open_request(request, True, "A search")
    assert opened.samples is not None
    trials = trial_method(method, opened.layers)
    if trials.gradient:
        check_temporary_room(opened.layers)
    split = split_samples(opened.model, opened.samples, rows_of(opened.batches[0]), request.seed)
    _check_labels(objective, opened.task, split.heldout)
    space = Space(names, given, len({layer.block for layer in opened.layers}), target, grid)
    folder, model_folder = _places(opened, output, save_model, method)
    identity = _identity(request, opened, space, method) | {"objective": objective, "calibration": split.facts}
    record = SearchRecord.open(folder, identity, overwrite)
    problem = _problem(request, opened, space, split.batches)
    most = int(min(limit.trials, space.most() + (ROUNDS if AUTO in space.allocators else 0)))
    progress(f"At most {most} trials in addition to uniform. Each prunes the model, so all take about equally long.")
    with TrialRunner(opened.model, opened.layers, split.batches, split.heldout, trials) as runner:
        race = Race(runner, OBJECTIVES[objective], record.known, record.write, progress)
        race.run(lambda race: schedule(space, problem, request.criterion, race), limit)
    plan = race.result({"heldout": split.facts["heldout"]})
    pruned = record.pruned and race.trials.keys() == record.known.keys()
    found = record.write(race, ended=True, pruned=pruned)
    if folder is not None:
        plan.save(folder / PLAN)
        draw(race, space, f"Trials at sparsity {target:g} with {request.criterion}", folder / PICTURE)
    if model_folder is not None and not pruned:
        with restored(opened.layers):
            run(Job(replace(request, plan=plan, output=model_folder, overwrite=True), opened, plan, method))
        found = record.write(race, ended=True, pruned=True)
    return Found(
        plan, race.best, list(race.trials.values()), found, folder, model_folder, _loss(opened.task, race.best)
    )


def _loss(task: Task, best: Trial) -> str:
    """What was compared on the held-out samples, in words of the task."""
    kl = best.loss("kl")
    if task.divergence is not KL:
        return f"{task.divergence.name} from the dense model {kl:.4f}"
    text = task.name == "text-generation"
    perplexity = f", token perplexity {math.exp(min(best.loss('nll'), 700)):.2f}" if text else ""
    return f"KL divergence from the dense model {kl:.4f} nats {each(task.unit)}{perplexity}"


def _check(objective: str, fields: Mapping[str, Any]) -> None:
    """Raise BillhookError for an unknown objective, or a field that a search does not use."""
    if objective not in OBJECTIVES:
        raise BillhookError(
            f"Unknown objective {objective!r}.{hint(objective, OBJECTIVES)} There are: {', '.join(OBJECTIVES)}."
        )
    known = SearchFields.__optional_keys__
    for name in fields.keys() - known:
        raise BillhookError(f"A search does not use {name!r}: leave it out.{hint(name, known)}")


def _check_labels(objective: str, task: Task, heldout: Batch) -> None:
    """Raise BillhookError where the likelihood of labels is asked for and there are none."""
    image = task.unit == "image" and (LABELS not in heldout or bool((heldout[LABELS] == UNKNOWN).any()))
    if objective == "ppl" and (image or task.divergence is not KL):
        raise BillhookError("The objective ppl needs labels, and the calibration data have none: use kl.")


def _names(allocator: str | Sequence[str]) -> tuple[str, ...]:
    """The allocators to race against uniform, each once."""
    given = allocator.split(",") if isinstance(allocator, str) else list(allocator)
    names = [n for name in given for n in (every() if name.strip() == "all" else [name.strip()])]
    for name in names:
        if name == RCO:
            raise BillhookError("rco has no hyperparameter to search for: use billhook prune --allocator rco.")
        if name != AUTO:
            ALLOCATORS.check(name)
    return tuple(name for name in dict.fromkeys(names) if name != "uniform")


def _places(
    opened: Opened, output: str | Path | None, save_model: bool, method: Method
) -> tuple[Path | None, Path | None]:
    """The directories of the search and of the pruned model; raises BillhookError or JobError if they cannot be
    written."""
    folder, source = None if output is None else Path(output), opened.source
    if folder is None or not save_model:
        return folder, None
    if source is None:
        choose_sink(opened.model, None)  # raises an error where the model could not be written
    needed = weight_bytes(source) if source else 0
    needed += gradient_bytes(opened.layers) if method.gradient else 0
    check_output(folder / MODEL if folder.is_dir() else folder, source, overwrite=True, needed=needed)
    return folder, folder / MODEL


def _problem(request: PruneRequest, opened: Opened, space: Space, batches: Sequence[Any]) -> AllocationProblem:
    """Measure the metrics of the allocators; raises BillhookError for a value that an allocator refuses."""
    columns = [*(needs(AUTO, request.criterion) if AUTO in space.allocators else ()), *space.columns()]
    table = measure(opened.model, columns, batches=batches, layers=opened.layers, facts=opened.facts)
    problem = AllocationProblem(table, request.sparsity, request.pattern)
    for name, options in space.first():
        problem.allocate(name, options)
    return problem


def _identity(request: PruneRequest, opened: Opened, space: Space, method: Method) -> dict[str, Any]:
    """What must be the same for a search to be continued; a model in memory is identified by its prunable weights."""
    model = dict(opened.facts)
    if opened.source is None:
        weights = hashlib.sha256()
        for layer in opened.layers:
            weights.update(tensor_bytes(layer.weight.contiguous().cpu()))
        model["digest"] = weights.hexdigest()
    return {
        "model": model,
        **request.selection,
        "sparsity": space.target,
        "pattern": request.pattern,
        "criterion": method.criterion,
        "criterion_options": dict(method.options),
        "group": method.group,
        "refine": request.refine,
        "allocators": list(space.allocators),
        "options": dict(space.given),
        "grid": space.grid,
        "dtype": dtype_name(opened.model.dtype),
    }
