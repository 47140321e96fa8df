"""Prune a model directory into a new one, in three steps: check, decide, run.

`check` (`billhook.steps.resolve`) finds every fault of a request (names, options, plan, data, output), and `decide`
makes the plan if none is given; neither changes anything. `run` applies the plan and writes the result. `prune` does
all three; `billhook.steps.apply.prune_` applies a plan to a model in memory.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel

from billhook.ambient import pinned
from billhook.distributed.collectives import barrier, gather
from billhook.distributed.torchrun import rank
from billhook.engine.activation_store import SPILL_GIB
from billhook.engine.batch import rows_of
from billhook.engine.gradient_file import Gradients
from billhook.engine.loop import LayerResult
from billhook.engine.method import Group, Prefix
from billhook.engine.walk import Block, Progress
from billhook.errors import BillhookError, Interrupted
from billhook.evaluation.quality import Loss
from billhook.plan.allocators import BudgetScope, allocate
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.racing.automatic import choose
from billhook.racing.hyperparameters import is_raced
from billhook.racing.race import AllocationProblem
from billhook.recovery.blockwise import Refine, Refining
from billhook.reports.publishing import publish
from billhook.steps.apply import prune_with
from billhook.steps.gradients import stored_gradients
from billhook.steps.keywords import MethodOptions
from billhook.steps.lost import loss_of
from billhook.steps.measure import measure_opened, rows_of_table
from billhook.steps.pack import pack
from billhook.steps.partial_output import PartialOutput, partial_output
from billhook.steps.prune_job import Job, PruneRequest, Report, record
from billhook.steps.request import in_memory
from billhook.steps.resolve import ResolvedRequest, check
from billhook.store.directory import save_pruned
from billhook.store.layout import WRITTEN
from billhook.store.output import absolute
from billhook.tasks.self_text import is_self, save_windows
from billhook.text.given import Given

Note = Callable[[LayerResult], None]


# fmt: off
@pinned
def prune(
    model: str | Path | PreTrainedModel, *,
    sparsity: float | None = None, pattern: str = "unstructured", output: str | Path | None = None,
    recipe: str | None = None, criterion: str | None = None, allocator: str | None = None,
    refine: Refining | None = None, prefix: Prefix | None = None, group: Group | None = None,
    options: Mapping[str, Any] | None = None,
    plan: str | Path | Plan | None = None, table: str | Path | Table | None = None,
    gradients: str | Path | Gradients | None = None,
    calibration: Given | None = None, samples: int = 128, length: int | None = None,
    published: bool = False, bos: str = "auto", skip_unreadable: bool = False,
    seed: int = 0, batch_size: int | None = None,
    targets: str | Sequence[str] = (), ignore: str | Sequence[str] = (),
    stacks: str | Sequence[str] = (), budget: BudgetScope = "each",
    device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False,
    overwrite: bool = False, resume: bool = False, spill_gib: float = SPILL_GIB, pack: bool = False,
    progress: Progress = lambda layer: None,
    **methods: Unpack[MethodOptions],
) -> Report:
    """Prune a model directory (or hub name), or a model in memory in place, and write the result to `output` if given.

    The arguments are those of the command line (docs/cli.md), and the options of the methods:
    prune("model", sparsity=0.7, recipe="alphapruning", epsilon=0.2, calibration="text.txt", output="pruned").
    `progress` is called with the name of each finished layer. Raises BillhookError (nothing changed) for an impossible
    request and JobError for a run that failed (nothing written).
    """
    fields = PruneRequest.__dataclass_fields__
    known = {key: value for key, value in locals().items() if key in fields and value is not None}
    for name in {"rounding", "sampling"} & methods.keys():
        raise BillhookError(f"{name} is no longer a field of a request: use published=True.")
    return run(prepare(PruneRequest(**{**known, "model": model, "options": {**(options or {}), **methods}})), progress)
# fmt: on


def prepare(request: PruneRequest, progress: Progress = lambda layer: None) -> Job:
    """Check everything about a request, cheapest first; measure and allocate if it has no plan."""
    return decide(check(request, progress), progress)


def decide(resolved: ResolvedRequest, progress: Progress = lambda layer: None) -> Job:
    """Measure and allocate, if there is no plan yet, and check the plan."""
    request, opened, plan = resolved.request, resolved.opened, resolved.plan
    if plan is None:
        # the plan of rank 0 for all, because sums differ in their last bits
        plan = gather(_allocate(resolved, progress))[0]
    try:
        plan.check({layer.name: layer.shape for layer in opened.layers})
    except BillhookError as error:
        chosen = request.plan is not None and (request.targets or request.ignore)
        advice = " --targets and --ignore must choose exactly the plan's layers." if chosen else ""
        raise BillhookError(f"{error}{advice}") from None
    return Job(
        request, opened, plan, resolved.method, resolved.gradients,
        identity=resolved.identity, packed=resolved.packed, begun=resolved.begun,
    )  # fmt: skip


def _allocate(resolved: ResolvedRequest, progress: Progress) -> Plan:
    """The request's plan, chosen by racing if the allocator or its hyperparameter is `auto`."""
    request, options, table = resolved.request, resolved.allocator_options, resolved.table
    opened = in_memory(resolved.opened, request) if resolved.on_trial else resolved.opened
    table = measure_opened(opened, resolved.needed, progress) if table is None else rows_of_table(table, opened)
    if not is_raced(request.allocator, options):
        return allocate(
            table, request.sparsity, allocator=request.allocator, pattern=request.pattern, budget=request.budget,
            **options,
        )  # fmt: skip
    assert opened.samples is not None
    problem = AllocationProblem(table, request.sparsity, request.pattern, request.budget)
    return choose(
        opened.model, opened.layers, opened.samples, problem, resolved.method, allocator=request.allocator,
        options=options, batch_size=rows_of(opened.batches[0]), seed=request.seed, progress=progress,
    )  # fmt: skip


def run(
    job: Job,
    progress: Progress = lambda layer: None,
    stopping: Callable[[], bool] = lambda: False,
    note: Note = lambda result: None,
) -> Report:
    """Apply a prepared job: prune, check, write.

    A model directory is pruned block by block into the output (`billhook.steps.partial_output`), a model in memory in
    place. The run ends after a block at which `stopping()` is true; `note` is called with the result of each layer of a
    finished block. Raises JobError, and Interrupted where the run can be resumed.
    """
    barrier()  # until all processes have checked the output
    lost = loss_of(job.opened, job.request.drawing.held_out)
    if job.request.output is None or job.opened.source is None or not job.opened.resources.streamed:
        results = _apply(job, progress, note)
        made = record(job, results, lost())
        output, notes = _save(job, made)
    else:
        output, notes = absolute(job.request.output), []
        results, made = _run_streamed(job, output, progress, stopping, note, lost)
    if job.packed is not None and output is not None and not rank():
        output, more = _pack(output, job.packed, job.request.overwrite)
        notes = [*notes, *more]
    warnings = [*made["steps"][-1]["warnings"], *notes]
    return Report(job.plan, results, output, time.perf_counter() - job.begun, warnings, made)


def _save(job: Job, made: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """Write a model that is in memory, if there is an output; its path and notes."""
    request, opened = job.request, job.opened
    if request.output is None or rank():
        return None, []
    output = Path(request.output)
    saved = save_pruned(opened.model, opened.source, output, record=made, overwrite=request.overwrite, publish=publish)
    return saved.path, [saved.note] if saved.note else []


def _run_streamed(
    job: Job,
    output: Path,
    progress: Progress,
    stopping: Callable[[], bool],
    note: Note,
    lost: Callable[[], Loss | None],
) -> tuple[list[LayerResult], dict[str, Any]]:
    """Prune block by block into the output, or resume a run; returns the results of all layers and the record."""
    stream, source, request = job.opened.resources.stream, job.opened.source, job.request
    assert stream is not None
    assert source is not None
    unfinished = partial_output(
        stream, source, output, job.identity, job.plan.to_json(),
        resume=request.resume, overwrite=request.overwrite, stopping=stopping,
    )  # fmt: skip
    with unfinished as partial:
        _store_generated_text(job, partial)
        before = [result for results in partial.state.results for result in results]
        for result in before:
            progress(result.layer)
        if job.method.gradient and job.gradients is None:
            job = replace(job, gradients=stored_gradients(job.opened, job.method.gradient, partial, progress))
        results = [*before, *_apply(job, progress, note, partial)]
        made = record(job, results, lost())
        partial.complete(made)
    return results, made


def _pack(dense: Path, output: Path, overwrite: bool) -> tuple[Path, list[str]]:
    """Pack the pruned directory and delete it; where packing fails, it remains."""
    try:
        report = pack(dense, output, overwrite=overwrite)
    except BillhookError as error:
        raise type(error)(f"{error} The pruned model is in {dense}.") from None
    except KeyboardInterrupt:
        command = f"billhook pack {dense} -o {output}"
        what = f"Stopped. The pruned model is in {dense}: {command} completes the job."
        raise Interrupted(what, stopped=True, advised=True) from None
    shutil.rmtree(dense)
    return report.output, report.notes


def _apply(job: Job, progress: Progress, note: Note, partial: PartialOutput | None = None) -> list[LayerResult]:
    request = job.request

    def finished(block: Block, results: list[LayerResult]) -> None:
        for result in results:
            note(result)
        if partial is not None:
            partial.finished(block, results)

    refine = Refine.asked(request.refine, request.seed)
    start = 0 if partial is None else partial.state.done
    return prune_with(
        job.opened, job.plan, job.method, gradients=job.gradients, refine=refine, start=start,
        progress=progress, finished=finished,
    )  # fmt: skip


def _store_generated_text(job: Job, partial: PartialOutput) -> None:
    """Store calibration text that the model generated until the run is finished, for use when it is resumed."""
    samples = job.opened.samples
    if samples is not None and is_self(samples.source) and not rank() and not partial.has_file(WRITTEN):
        save_windows(partial.folder / WRITTEN, samples)
        partial.add_file(WRITTEN)
