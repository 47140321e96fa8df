"""The main job: a model directory in, a pruned model directory out, in three steps: check, decide, run.

`check` does everything that can fail because of what was asked (names, options, plan, data, output place), `decide`
makes the plan where none was given; both change nothing and are together `prepare`. `run` applies the plan and writes
the result. `prune` is all of it.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.architectures.layers import find_layers
from billhook.distributed.collectives import barrier, gather
from billhook.distributed.torchrun import rank
from billhook.engine.gradient_file import Gradients, open_gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.loop import LayerResult, prune_
from billhook.engine.streaming import stream_of
from billhook.engine.walk import Block
from billhook.errors import BillhookError, Interrupted
from billhook.measurement.measure import measure
from billhook.packed.packing import pack
from billhook.plan.allocators import allocate
from billhook.plan.metrics import fact
from billhook.plan.plan import SparsityPlan
from billhook.plan.table import Table
from billhook.racing.automatic import choose
from billhook.racing.hyperparameters import is_raced
from billhook.racing.race import Problem
from billhook.recover.blockwise import Refine
from billhook.steps.partial_output import GRADIENTS, PartialOutput, unfinished
from billhook.steps.record import Job, Report, gradient_of, record
from billhook.steps.request import Opened, Request, calibration_facts, open_request
from billhook.steps.resolve import ResolvedRequest, check
from billhook.store.sinks import save_pruned
from billhook.trials.trials import Setting


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
    options = {**(fields.get("options") or {}), **{key: value for key, value in fields.items() if key not in known}}
    request = Request(model, **{**{key: value for key, value in fields.items() if key in known}, "options": options})
    return run(prepare(request), progress)


def prepare(request: Request, progress: Callable[[str], None] = lambda layer: None) -> Job:
    """Check everything about a request, cheapest first; measure and allocate if the request asks for it."""
    return decide(check(request), progress)


def decide(draft: ResolvedRequest, progress: Callable[[str], None] = lambda layer: None) -> Job:
    """Measure and allocate, where there is no plan yet; check the plan."""
    request, opened, plan, table = draft.request, draft.opened, draft.plan, draft.table
    if plan is None:
        table = measure_opened(opened, draft.needed, progress) if table is None else _rows(table, opened)
        made = _allocate(request, opened, table, draft.allocator_options, draft.criterion_options, progress)
        plan = gather(made)[0]  # sums differ in last bits
    try:
        plan.check({layer.name: layer.shape for layer in opened.layers})
    except BillhookError as error:
        chosen = request.plan is not None and (request.targets or request.ignore)
        raise BillhookError(
            f"{error} --targets and --ignore must choose exactly the plan's layers." if chosen else str(error)
        ) from None
    return Job(request, opened, plan, draft.criterion_options, draft.gradients, draft.identity, draft.packed)


def _allocate(
    request: Request,
    opened: Opened,
    table: Table,
    options: Mapping[str, Any],
    criterion_options: Mapping[str, Any],
    progress: Callable[[str], None],
) -> SparsityPlan:
    """The request's plan, from a race where the allocator or its hyperparameter is `auto`."""
    if not is_raced(request.allocator, options):
        return allocate(table, request.sparsity, allocator=request.allocator, pattern=request.pattern, **options)
    assert opened.calibration is not None
    return choose(
        opened.model,
        opened.layers,
        opened.calibration,
        Problem(table, request.sparsity, request.pattern),
        Setting(request.criterion, dict(criterion_options), request.group),
        allocator=request.allocator,
        options=options,
        batch_size=len(opened.batches[0]),
        seed=request.seed,
        progress=progress,
    )


def run(
    job: Job,
    progress: Callable[[str], None] = lambda layer: None,
    stopping: Callable[[], bool] = lambda: False,
    note: Callable[[LayerResult], None] = lambda result: None,
) -> Report:
    """Apply a prepared job: prune, check, write.

    A model directory is pruned block by block into the output (`billhook.steps.partial_output`), a model in memory in
    place. The run ends after a block at which `stopping()` is true; `note` is given the results of a block's layers
    when they are made. Raises JobError, and Interrupted where the run can be continued.
    """
    barrier()  # until all processes have looked at the output place
    start = time.perf_counter()
    request, opened = job.request, job.opened
    stream, output, notes = stream_of(opened.model), None, []
    if request.output is None or stream is None or opened.source is None:
        results = _prune(job, progress, note)
        made = record(job, results)
        if request.output is not None and not rank():
            saved = save_pruned(
                opened.model, opened.source, Path(request.output), record=made, overwrite=request.overwrite
            )
            output, notes = saved.path, [saved.note] if saved.note else []
    else:
        output = Path(request.output).expanduser().resolve()
        may = {"resume": request.resume, "overwrite": request.overwrite}
        with unfinished(
            stream, opened.source, output, job.identity, job.plan.to_json(), **may, stopping=stopping
        ) as place:
            before = [result for results in place.state.results for result in results]
            for result in before:
                progress(result.layer)
            results = [
                *before,
                *_prune(replace(job, gradients=_gradients_of(job, place, progress)), progress, note, place),
            ]
            made = record(job, results)
            place.complete(made)
    if job.packed is not None and output is not None and not rank():
        output, more = _pack(output, job.packed, request.overwrite)
        notes = [*notes, *more]
    return Report(job.plan, results, output, time.perf_counter() - start, [*made["warnings"], *notes], made)


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
    job: Job, progress: Callable[[str], None], note: Callable[[LayerResult], None], place: PartialOutput | None = None
) -> list[LayerResult]:
    request, opened = job.request, job.opened

    def finished(block: Block, results: list[LayerResult]) -> None:
        for result in results:
            note(result)
        if place is not None:
            place.finished(block, results)

    return prune_(
        opened.model,
        job.plan,
        criterion=request.criterion,
        batches=opened.batches,
        layers=opened.layers,
        group=request.group,
        rounding=request.rounding,
        gradients=job.gradients,
        progress=progress,
        spill_gib=request.spill_gib,
        refine=None
        if request.refine == "none"
        else Refine(tune_norms_and_biases=request.refine == "blocks+norms", seed=request.seed),
        start=0 if place is None else place.state.done,
        finished=finished,
        **job.criterion_options,
    )


def _gradients_of(job: Job, place: PartialOutput, progress: Callable[[str], None]) -> Gradients | None:
    """The gradients the criterion reads: those given, those of the run that is continued, or new ones, kept until the
    run is done."""
    statistic = gradient_of(job.request, job.criterion_options)
    if not statistic or job.gradients is not None:
        return job.gradients
    path = place.folder / (f"{rank()}.{GRADIENTS}" if rank() else GRADIENTS)
    if place.has(GRADIENTS):
        return open_gradients(place.folder / GRADIENTS)
    layers, batches = job.opened.layers, job.opened.batches
    found = compute_gradients(
        job.opened.model, batches, statistic, path, layers=layers, spill_gib=job.request.spill_gib, progress=progress
    )
    if not rank():
        place.keep(GRADIENTS)
    return found


def measure_model(
    request: Request, metrics: Sequence[str], progress: Callable[[str], None] = lambda layer: None
) -> Table:
    """Measure the layers of a request's model; text is read only if a metric looks at activations."""
    return measure_opened(open_to_measure(request, metrics), metrics, progress)


def open_to_measure(request: Request, metrics: Sequence[str]) -> Opened:
    """Open what `measure_model` measures."""
    activations = [name for name in metrics if fact(name).needs_text]
    streamed = not any(fact(name).reads == "trial" for name in metrics)
    return open_request(request, bool(activations), f"The metric {' and '.join(activations)}", streamed=streamed)


def make_gradients(
    request: Request,
    statistic: str,
    path: Path,
    progress: Callable[[str], None] = lambda layer: None,
    begin: Callable[[Opened], None] = lambda opened: None,
) -> Gradients:
    """Accumulate the gradients of a request's model on its calibration text and write them to `path`; see
    `compute_gradients`.

    `begin` is called with what was opened before the work starts.
    """
    opened = open_request(request, True, "A gradient", streamed=True)
    begin(opened)
    facts = {"model": opened.facts, "calibration": calibration_facts(opened)}
    layers, batches = opened.layers, opened.batches
    more: dict[str, Any] = {"facts": facts, "spill_gib": request.spill_gib, "progress": progress}
    return compute_gradients(opened.model, batches, statistic, path, layers=layers, **more)


def _rows(table: Table, opened: Opened) -> Table:
    """The rows of a given table for the layers to prune; a table of the whole model serves for any part of it.

    Raises BillhookError for a table of other weights: the digest of a model in memory is not known, and not compared.
    """
    here, there = opened.facts, table.model
    if here["digest"] and there.get("digest") not in (None, here["digest"]):
        raise BillhookError(
            f"The table is of {there.get('name', 'another model')}, whose weights are not those of {here['name']}. "
            f"Make one with billhook measure {opened.source}, or carry the decision over as a plan: billhook "
            "plan TABLE, then --plan."
        )
    return table.only(
        {layer.name for layer in opened.layers}, {layer.name: layer.shape for layer in find_layers(opened.model)}
    )


def measure_opened(
    opened: Opened, metrics: Sequence[str], progress: Callable[[str], None] = lambda layer: None
) -> Table:
    """Measure the layers of a model that was opened."""
    facts = opened.facts
    table = measure(opened.model, metrics, batches=opened.batches, layers=opened.layers, facts=facts, progress=progress)
    if opened.calibration is not None:
        table.made_by["calibration"] = calibration_facts(opened)
    return table
