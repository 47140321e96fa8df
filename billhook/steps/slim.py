"""Remove whole units of a model directory into a smaller one, block by block, in three steps: check, plan, run.

The result is an ordinary directory with smaller numbers in its config.json, which every engine opens. A run that is
stopped can be resumed to the same bytes. Before the directory is put in its place, it is opened by stock
`transformers`, and its predictions are compared with those of the model in memory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from billhook.ambient import pinned
from billhook.architectures.gguf_config import new_shape_note
from billhook.architectures.slim_blocks import check_blocks
from billhook.architectures.slim_config import shape_notes, slimmed, stored_counts
from billhook.distributed.collectives import barrier, gather
from billhook.engine.gradient_file import Gradients
from billhook.engine.loop import LayerResult
from billhook.engine.removal import Removal, dropping, remove_parts_
from billhook.engine.resources import Resources
from billhook.engine.routing import restrict_
from billhook.engine.streaming import open_streamed
from billhook.engine.walk import Block, Progress
from billhook.errors import BillhookError
from billhook.methods.structured import STRUCTURED
from billhook.methods.structured.experts import EXPERTS
from billhook.plan.allocators import AUTO
from billhook.plan.plan import Plan, load_plan
from billhook.reports.slim_card import publish_slim
from billhook.steps.gradients import stored_gradients
from billhook.steps.lost import loss_of
from billhook.steps.partial_output import PartialOutput, partial_output
from billhook.steps.request import Opened, changed, check_text_given, draw_text, identity, open_model
from billhook.steps.same_predictions import check_same_predictions
from billhook.steps.slim_allocation import UnitAllocation
from billhook.steps.slim_choice import choose_kinds, choose_plan, parameters_of, units_of
from billhook.steps.slim_files import Smaller, SmallerFiles
from billhook.steps.slim_job import SlimJob, SlimReport, SlimRequest, kept_parts, record
from billhook.steps.slim_plan import check_plan, dropped_by, kinds_in, kinds_of
from billhook.steps.state import partial_folder, unfinished_run
from billhook.store.checkpoint import check_directory
from billhook.store.files import copy_files, read_json, write_json
from billhook.store.output import absolute
from billhook.store.shards import result_bytes, weight_bytes, without_missing_entry, write_index
from billhook.tasks.opening import task_of_config

_NEAR = 0.01  # of the parameters in blocks: a share that is so far from what was asked needs no note


@pinned
def slim(
    model: str | Path,
    remove: float | None,
    output: str | Path,
    *,
    progress: Progress = lambda unit: None,
    **fields: Any,
) -> SlimReport:
    """Remove a fraction of the parameters in the blocks of a model directory (or hub name), and write it to `output`.

    The keyword arguments are the fields of `SlimRequest` and the options of the method. Raises BillhookError (nothing
    written) for an impossible request and JobError for a run that failed.
    """
    request = SlimRequest.given(model=model, output=output, remove=remove, **fields)
    return run(prepare(request, progress), progress)


def prepare(request: SlimRequest, progress: Progress = lambda unit: None) -> SlimJob:
    """Check everything about a request, cheapest first, and make its plan; nothing is changed."""
    STRUCTURED.check(request.method)
    given = load_plan(request.plan) if isinstance(request.plan, str | Path) else request.plan
    asked = kinds_of(request.units)
    kinds = asked if given is None else kinds_in(given)
    EXPERTS.check(request.experts)
    allocation, options = UnitAllocation.of(request, kinds)
    removal = Removal(request.method, options)
    _check_asked(request, kinds, given is not None)
    choosing = given is None and bool({"blocks", AUTO} & set(kinds) or allocation.needs_text)
    _check_text_given(request, kinds, removal, choosing)
    opened = open_model(request.model_request(), streamed=True)
    stream = opened.resources.stream
    if stream is None or opened.source is None:
        raise BillhookError(f"{request.model} cannot be read one block at a time, so no units can be removed from it.")
    if "blocks" in kinds:
        check_blocks(stream.model)
    resumed = unfinished_run(absolute(request.output), resume=request.resume, overwrite=request.overwrite)
    if given is None and resumed is not None:
        given = Plan.from_json(resumed.plan, str(partial_folder(absolute(request.output))))
    if given is None and choosing:
        opened = draw_text(opened, request.model_request(), progress)
    if given is not None:
        plan = check_plan(given, units_of(opened, kinds_in(given)), stream.prefixes, request.shape, asked)
    elif kinds == [AUTO]:
        checked = partial(_checked_job, request, opened, removal)
        plan = choose_kinds(request, opened, removal, allocation, checked, progress)
    else:
        plan = choose_plan(request, opened, kinds, removal, allocation, progress)
    plan = gather(plan)[0]  # that of process 0, because sums differ in their last bits
    return _checked_job(request, opened, removal, plan, progress)


def _check_asked(request: SlimRequest, kinds: Sequence[str], planned: bool) -> None:
    """Raise BillhookError where it is not clear how much goes, or options contradict each other."""
    if planned == (request.remove is not None):
        raise BillhookError(
            "Give either the fraction of the parameters in blocks to remove (--remove 0.25), or a plan of kept parts "
            "(--plan FILE)."
        )
    if request.remove is not None and not 0 < request.remove < 1:
        raise BillhookError(f"The fraction to remove must be between 0 and 1 (0.25 is 25%), got {request.remove}.")
    if kinds == ["blocks"] and (request.allocator or request.shape):
        raise BillhookError(
            "An allocator and a shape say how much the units of each block lose, and blocks go whole: leave them out, "
            "or name other kinds of units too. drop_by says how blocks are chosen."
        )


def _check_text_given(request: SlimRequest, kinds: Sequence[str], removal: Removal, choosing: bool) -> None:
    """Raise BillhookError where something reads text, and there is none."""
    used = list(kinds) != ["experts"] and bool(removal.observed or removal.gradient)
    reads = {f"Removing units with {request.method}": used, "Removing experts": "experts" in kinds}
    reads |= {"Choosing what goes": choosing}
    reader = next((who for who, reads_text in reads.items() if reads_text), "")
    check_text_given(request, bool(reader), reader)


def _checked_job(
    request: SlimRequest, opened: Opened, removal: Removal, plan: Plan, progress: Progress = lambda unit: None
) -> SlimJob:
    """The job of a plan, once it is certain that the smaller model can be written."""
    stream = opened.resources.stream
    assert stream is not None
    assert opened.source is not None
    gone = dropped_by(plan, stream.prefixes)
    blocks = [index for index in range(len(stream.blocks)) if index not in gone.values()]
    units = [unit for unit in units_of(opened, kinds_in(plan)) if unit.name in plan.units and unit.block in blocks]
    counts = stored_counts(opened.model, units, plan.units)
    config, changes, notes = slimmed(opened.model, units, counts, blocks, len(stream.blocks))
    notes = [*notes, *shape_notes(opened.model, units, plan.units, counts)]
    notes += new_shape_note(opened.model.config.to_dict(), config.to_dict())
    if removal.drifts and len({unit.consumer is None for unit in units}) == 2:
        removal = removal.without_target()
        notes = [*notes, "dense_target=0, because tokens go to other experts than in the dense model."]
    smaller = Smaller.open(opened.source, stream, config, units=units, counts=counts, blocks=blocks)
    needed = removal.observed or removal.gradient or any(unit.kind == "experts" for unit in units)
    if opened.samples is None and needed:
        opened = draw_text(opened, request.model_request(), progress)
    run = identity(request.model_request(), opened, {**request.options, **removal.options}, plan)
    run |= {"step": "slim", "remove": request.remove, "units": kinds_of(request.units)}
    run |= {key: getattr(request, key) for key in ("method", "experts", "drop_by", "allocator", "shape")}
    job = SlimJob(
        request, opened, units=units, plan=plan, removal=removal, smaller=smaller, config=changes, identity=run,
        parameters=parameters_of(opened), notes=notes,
    )  # fmt: skip
    notes += _share_notes(job)
    return job


def _share_notes(job: SlimJob) -> list[str]:
    """What to say where parameters are stored as zeros, or the share that goes is not the one asked for."""
    total, remove, notes = sum(job.parameters), job.request.remove, list[str]()
    padding, removed = job.padding / total, (job.removed + job.padding) / total
    if remove is not None and abs(removed - remove) > _NEAR:
        notes.append(f"{removed:.1%} of the parameters in blocks go instead of {remove:.1%}: units only go whole.")
    if padding:
        notes.append(
            f"{padding:.1%} of the parameters in blocks are stored as zeros: all blocks have the widest's shape, "
            "which every program opens."
        )
    return notes


def run(
    job: SlimJob, progress: Progress = lambda unit: None, stopping: Callable[[], bool] = lambda: False
) -> SlimReport:
    """Remove units block by block into the output, or resume a run.

    Raises JobError, and Interrupted where the run can be resumed.
    """
    start, request, opened, smaller = time.perf_counter(), job.request, job.opened, job.smaller
    source, output = opened.source, absolute(request.output)
    assert source is not None
    barrier()  # until all processes have checked the output
    lost = loss_of(opened, request.drawing.held_out)
    files = SmallerFiles(smaller)
    unfinished = partial_output(
        smaller.source, source, output, job.identity, job.plan.to_json(),
        resume=request.resume, overwrite=request.overwrite, stopping=stopping, files=files,
    )  # fmt: skip
    with ExitStack() as stack, unfinished as partial:
        before = [result for results in partial.state.results for result in results]
        _keep(job, before)
        for unit in kept_parts(job, before):
            progress(unit)
        gradients = _gradients(job, partial, progress)
        gone = [i for i in range(len(smaller.source.blocks)) if i not in smaller.blocks]
        dropped = stack.enter_context(dropping(opened.model, gone, opened.resources))

        def finished(block: Block, results: list[LayerResult]) -> None:
            _keep(job, results)
            partial.finished(block, results)

        results = before + remove_parts_(
            opened.model, job.units, job.plan.units, job.removal, opened.batches, experts=request.experts,
            dropped=dropped, gradients=gradients, resources=opened.resources, start=partial.state.done,
            progress=progress, finished=finished,
        )  # fmt: skip
        loss = lost(smaller.stream.model, Resources(stream=smaller.stream))
        made = record(job, results, loss)
        partial.complete(made, _finish(job, files, source), published=publish_slim, model=smaller.stream.model)
    return SlimReport(
        output=output, kept=kept_parts(job, results), counts={unit.name: unit.count for unit in job.units},
        dropped=gone, removed=job.removed / sum(job.parameters), padding=job.padding / sum(job.parameters),
        size=result_bytes(output), source_size=weight_bytes(source), seconds=time.perf_counter() - start,
        loss=loss, warnings=made["steps"][-1]["warnings"],
    )  # fmt: skip


def _gradients(job: SlimJob, partial: PartialOutput, progress: Progress) -> Gradients | None:
    """The gradients of the consumers, stored with the unfinished output, if the method reads any."""
    if not job.removal.gradient or not job.consumers:
        return None
    opened = changed(job.opened, layers=job.consumers)
    return stored_gradients(opened, job.removal.gradient, partial, progress)


def _keep(job: SlimJob, results: list[LayerResult]) -> None:
    counts = {unit.name: unit.count for unit in job.units}
    for name, kept in kept_parts(job, results).items():
        stays = torch.zeros(counts[name], dtype=torch.bool)
        stays[kept] = True
        job.smaller.kept[name] = stays
    for unit in job.units:
        if unit.kind == "experts" and unit.name in job.smaller.kept:
            restrict_(job.opened.model, unit, job.smaller.kept[unit.name])


def _finish(job: SlimJob, files: SmallerFiles, source: Path) -> Callable[[Path], Mapping[str, Any]]:
    """What completes the weight files in a folder, checks them, and returns the new entries of config.json."""

    def finish(folder: Path) -> Mapping[str, Any]:
        write_index(folder, files.files)
        config = read_json(source / "config.json", "model configuration", own=False)
        write_json(folder / "config.json", without_missing_entry({**config, **job.config}, folder), own=False)
        trusted = job.request.trust_remote_code
        copy_files(source, folder, lambda path: trusted and path.suffix == ".py")
        kind = task_of_config(folder, check_directory(folder)).auto_class  # a decoder without a head has another
        dtype, device = job.opened.model.dtype, str(job.opened.model.device)
        written = open_streamed(folder, kind, dtype=dtype, device=device, trust_remote_code=trusted)
        check_same_predictions(job.opened, written.model, job.smaller.blocks)
        return job.config

    return finish
