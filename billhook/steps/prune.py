"""The main job: a model directory in, a pruned model directory out, in three steps: check, decide, run.

`check` (`billhook.steps.resolve`) finds everything that can be wrong with what was asked (names, options, plan, data,
output place), `decide` makes the plan where none was given; neither changes anything. `run` applies the plan and writes
the result. `prune` does all of it; `prune_` applies a plan to a model in memory.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer, find_layers
from billhook.distributed.collectives import barrier, check_share, gather
from billhook.distributed.torchrun import rank
from billhook.engine.batch import Batch, as_batches, rows_of
from billhook.engine.gradient_file import Gradients, open_gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.loop import Group, LayerResult, Method, Rounding, Tuner, apply_plan_
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Block, Progress
from billhook.errors import BillhookError, Interrupted
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import allocate
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.racing.automatic import choose
from billhook.racing.hyperparameters import is_raced
from billhook.racing.race import Problem
from billhook.recover.blockwise import BlockTuner, Refine
from billhook.reports.publishing import publish
from billhook.steps.measure import measure_opened, rows_of_table
from billhook.steps.pack import pack
from billhook.steps.partial_output import PartialOutput, partial_output
from billhook.steps.record import Job, Report, record
from billhook.steps.request import Opened, Request
from billhook.steps.resolve import ResolvedRequest, check
from billhook.store.directory import save_pruned
from billhook.store.layout import GRADIENTS, WRITTEN
from billhook.tasks.opening import task_of
from billhook.tasks.self_text import is_self, save_windows

REMOVED_FIELDS = {"rounding": "published=True", "sampling": "published=True"}


def prune(
    model: str | Path | PreTrainedModel, *, progress: Callable[[str], None] = lambda layer: None, **fields: Any
) -> Report:
    """Prune a model directory (or hub name), or a model in memory (in place), and write the result if `output` is
    given.

    The keyword arguments are the fields of `Request`: sparsity=0.7, criterion="wanda", allocator="alphapruning",
    epsilon=0.3, calibration="text.txt", output="pruned", ... Raises BillhookError (nothing changed) for what cannot be
    done as asked and JobError for a run that failed (nothing written).
    """
    known = Request.__dataclass_fields__
    for name in REMOVED_FIELDS.keys() & fields.keys():
        raise BillhookError(f"{name} is no longer a field of a request: use {REMOVED_FIELDS[name]}.")
    options = {**(fields.get("options") or {}), **{key: value for key, value in fields.items() if key not in known}}
    request = Request(model, **{**{key: value for key, value in fields.items() if key in known}, "options": options})
    return run(prepare(request), progress)


def prepare(request: Request, progress: Callable[[str], None] = lambda layer: None) -> Job:
    """Check everything about a request, cheapest first; measure and allocate if the request asks for it."""
    return decide(check(request, progress), progress)


def decide(draft: ResolvedRequest, progress: Callable[[str], None] = lambda layer: None) -> Job:
    """Measure and allocate, where there is no plan yet; check the plan."""
    request, opened, plan, table = draft.request, draft.opened, draft.plan, draft.table
    if plan is None:
        table = measure_opened(opened, draft.needed, progress) if table is None else rows_of_table(table, opened)
        made = _allocate(request, opened, table, draft.allocator_options, draft.method, progress)
        plan = gather(made)[0]  # sums differ in last bits
    try:
        plan.check({layer.name: layer.shape for layer in opened.layers})
    except BillhookError as error:
        chosen = request.plan is not None and (request.targets or request.ignore)
        raise BillhookError(
            f"{error} --targets and --ignore must choose exactly the plan's layers." if chosen else str(error)
        ) from None
    return Job(request, opened, plan, draft.method, draft.gradients, draft.identity, draft.packed)


def _allocate(
    request: Request,
    opened: Opened,
    table: Table,
    options: Mapping[str, Any],
    method: Method,
    progress: Callable[[str], None],
) -> Plan:
    """The request's plan, from a race where the allocator or its hyperparameter is `auto`."""
    if not is_raced(request.allocator, options):
        return allocate(table, request.sparsity, allocator=request.allocator, pattern=request.pattern, **options)
    assert opened.samples is not None
    return choose(
        opened.model,
        opened.task,
        opened.layers,
        opened.samples,
        Problem(table, request.sparsity, request.pattern),
        method,
        allocator=request.allocator,
        options=options,
        batch_size=rows_of(opened.batches[0]),
        seed=request.seed,
        progress=progress,
    )


def run(
    job: Job,
    progress: Progress = lambda layer: None,
    stopping: Callable[[], bool] = lambda: False,
    note: Callable[[LayerResult], None] = lambda result: None,
) -> Report:
    """Apply a prepared job: prune, check, write.

    A model directory is pruned block by block into the output (`billhook.steps.partial_output`), a model in memory in
    place. The run ends after a block at which `stopping()` is true; `note` is given the results of a block's layers as
    soon as they exist. Raises JobError, and Interrupted where the run can be resumed.
    """
    barrier()  # until all processes have looked at the output place
    start = time.perf_counter()
    request, opened = job.request, job.opened
    output, notes = None, []
    if request.output is None or opened.source is None or not opened.resources.streamed:
        results = _prune(job, progress, note)
        made = record(job, results)
        if request.output is not None and not rank():
            options: dict[str, Any] = {"record": made, "overwrite": request.overwrite, "publish": publish}
            saved = save_pruned(opened.model, opened.source, Path(request.output), **options)
            output, notes = saved.path, [saved.note] if saved.note else []
    else:
        output = Path(request.output).expanduser().resolve()
        results, made = _prune_streamed(job, opened.source, output, progress, stopping, note)
    if job.packed is not None and output is not None and not rank():
        output, more = _pack(output, job.packed, request.overwrite)
        notes = [*notes, *more]
    warnings = [*made["steps"][-1]["warnings"], *notes]
    return Report(job.plan, results, output, time.perf_counter() - start, warnings, made)


def _prune_streamed(
    job: Job,
    source: Path,
    output: Path,
    progress: Progress,
    stopping: Callable[[], bool],
    note: Callable[[LayerResult], None],
) -> tuple[list[LayerResult], dict[str, Any]]:
    """Prune block by block into the output, or go on with what a run has left there; the results and the record."""
    stream, request = job.opened.resources.stream, job.request
    assert stream is not None
    may = {"resume": request.resume, "overwrite": request.overwrite}
    with partial_output(stream, source, output, job.identity, job.plan.to_json(), **may, stopping=stopping) as place:
        _keep_written(job, place)
        before = [result for results in place.state.results for result in results]
        for result in before:
            progress(result.layer)
        prepared = replace(job, gradients=_kept_gradients(job, place, progress))
        results = [*before, *_prune(prepared, progress, note, place)]
        made = record(job, results)
        place.complete(made)
    return results, made


def _pack(dense: Path, output: Path, overwrite: bool) -> tuple[Path, list[str]]:
    """Turn the pruned directory into a packed one; where that fails it stays, so that the pruning was not in vain."""
    try:
        report = pack(dense, output, overwrite=overwrite)
    except BillhookError as error:
        raise type(error)(f"{error} The pruned model is in {dense}.") from None
    except KeyboardInterrupt:
        raise Interrupted(
            f"Stopped. The pruned model is in {dense}: billhook pack {dense} -o {output} does the rest."
        ) from None
    shutil.rmtree(dense)
    return report.output, report.notes


def _prune(
    job: Job, progress: Progress, note: Callable[[LayerResult], None], place: PartialOutput | None = None
) -> list[LayerResult]:
    request, opened = job.request, job.opened

    def finished(block: Block, results: list[LayerResult]) -> None:
        for result in results:
            note(result)
        if place is not None:
            place.finished(block, results)

    tune_all = request.refine == "blocks+norms"
    return prune_with(
        opened,
        job.plan,
        job.method,
        gradients=job.gradients,
        refine=None if request.refine == "none" else Refine(tune_norms_and_biases=tune_all, seed=request.seed),
        start=0 if place is None else place.state.done,
        progress=progress,
        finished=finished,
    )


def _keep_written(job: Job, place: PartialOutput) -> None:
    """Keep calibration text that the model wrote until the run is done, so that resuming it does not repeat the
    work."""
    samples = job.opened.samples
    if samples is not None and is_self(samples.source) and not rank() and not place.has(WRITTEN):
        save_windows(place.folder / WRITTEN, samples)
        place.keep(WRITTEN)


def _kept_gradients(job: Job, place: PartialOutput, progress: Progress) -> Gradients | None:
    """The gradients the criterion reads: given, kept by the run that is resumed, or new ones, kept until it is done."""
    if not job.method.gradient or job.gradients is not None:
        return job.gradients
    if place.has(GRADIENTS):
        return open_gradients(place.folder / GRADIENTS)
    path = place.folder / (f"{rank()}.{GRADIENTS}" if rank() else GRADIENTS)
    found = _compute_gradients(job.opened, job.method.gradient, path, progress)
    if not rank():
        place.keep(GRADIENTS)
    return found


def _compute_gradients(opened: Opened, statistic: str, path: Path, progress: Progress) -> Gradients:
    options: dict[str, Any] = {"layers": opened.layers, "resources": opened.resources, "progress": progress}
    return compute_gradients(opened.model, opened.batches, statistic, path, loss=opened.task.loss, **options)


@contextmanager
def _open_gradients(
    opened: Opened, statistic: str, given: Gradients | None, progress: Progress
) -> Iterator[Gradients | None]:
    """The gradients a criterion reads: those given, once checked, or new ones in a temporary file; None if none."""
    if not statistic:
        yield None
    elif given is not None:
        given.check(statistic, {layer.name: layer.shape for layer in opened.layers})
        yield given
    else:
        with tempfile.TemporaryDirectory(prefix="billhook.") as folder:
            yield _compute_gradients(opened, statistic, Path(folder) / GRADIENTS, progress)


def prune_with(
    opened: Opened,
    plan: Plan,
    method: Method,
    *,
    gradients: Gradients | None = None,
    refine: Refine | None = None,
    start: int = 0,
    progress: Progress = lambda layer: None,
    finished: Callable[[Block, list[LayerResult]], None] = lambda block, results: None,
) -> list[LayerResult]:
    """Change the weights of an opened model in place as `plan` says; see `prune_` and `billhook.engine.loop`."""
    plan.check({layer.name: layer.shape for layer in opened.layers})
    if method.observed or (method.gradient and gradients is None) or refine:
        if not opened.batches:
            who = "--refine" if refine else f"The criterion {method.criterion}"
            raise BillhookError(f"{who} looks at activations: give text with --calibration SOURCE.")
        check_share(len(opened.batches))
    tuner: Tuner | None = None
    if refine is not None:
        tuner = BlockTuner(refine, opened.model, opened.batches, opened.resources)
    with _open_gradients(opened, method.gradient, gradients, progress) as found:
        return apply_plan_(
            opened.model,
            plan,
            method,
            opened.batches,
            layers=opened.layers,
            gradients=found,
            tuner=tuner,
            resources=opened.resources,
            start=start,
            progress=progress,
            finished=finished,
        )


def prune_(
    model: PreTrainedModel,
    plan: Plan,
    *,
    criterion: str = "wanda",
    batches: Tensor | Batch | Sequence[Tensor | Batch] = (),
    layers: Sequence[Layer] | None = None,
    group: Group | None = None,
    rounding: Rounding = "exact",
    gradients: Gradients | None = None,
    refine: Refine | None = None,
    resources: Resources = IN_MEMORY,
    start: int = 0,
    progress: Progress = lambda layer: None,
    finished: Callable[[Block, list[LayerResult]], None] = lambda block, results: None,
    **options: Any,
) -> list[LayerResult]:
    """Remove weights of a model in memory, in place, as `plan` says.

    `batches` are token ids int64 [windows, length] or mappings of keyword arguments (a single one is one batch), needed
    by every criterion but magnitude; `layers` are the layers the plan is for (all prunable ones by default); `group`
    overrides the criterion's comparison group; `gradients` are those of the dense model for a criterion that reads them
    (computed first if not given); `refine` tunes what is left of each block once it is pruned; `start` is the first
    block to prune, those before it being pruned already; `finished` is called after each block; `options` are the
    criterion's own. Raises BillhookError before anything changes if plan, criterion, gradients or options do not fit,
    JobError if the zeros made are not the zeros planned or activations are not finite.
    """
    method = Method(criterion, CRITERIA.configure(criterion, options), group, rounding)
    chosen = find_layers(model) if layers is None else list(layers)
    opened = Opened(None, model, task_of(model), resources, chosen, None, as_batches(model, batches))
    run_options: dict[str, Any] = {"gradients": gradients, "refine": refine, "start": start}
    return prune_with(opened, plan, method, **run_options, progress=progress, finished=finished)
