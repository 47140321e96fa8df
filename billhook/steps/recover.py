"""Train what a pruned or slimmed model has left, with the dense model as its teacher, in three steps: check, decide,
run.

Zeros stay zeros: they are counted before and after, and a weight that came back is an error. A run that is stopped can
be resumed to the same bytes. Where no state of the training is better on held-out text than the input, the output has
the input's bytes.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.ambient import evaluating, pinned
from billhook.distributed.collectives import barrier, connected, gather, world
from billhook.engine.batch import row_length, rows_of, split_rows
from billhook.engine.walk import Progress
from billhook.errors import BillhookError, JobError
from billhook.evaluation.quality import Reference
from billhook.recovery.objectives import OBJECTIVES
from billhook.recovery.recomputing import recomputing
from billhook.recovery.sharding import gather_
from billhook.recovery.training import Recovered, best_share, race, train_
from billhook.steps.recover_adapters import add_adapters, merged, save_adapter
from billhook.steps.recover_blocks import BlocksReport, prepare_blocks, run_blocks
from billhook.steps.recover_job import IDENTITY, TOKENS, RecoverJob, RecoverReport, RecoverRequest, record, zeros_of
from billhook.steps.recover_setup import (
    check_memory,
    check_sharding,
    draw_windows,
    make_setup,
    state_bytes,
    steps_in,
    teacher_fits,
)
from billhook.steps.recover_source import Source, card
from billhook.steps.request import Opened, changed, check_text_given, identity, listed, open_model
from billhook.steps.state import unfinished_run
from billhook.steps.teacher import Teacher, find_teacher, open_teacher
from billhook.steps.training_folder import TrainingFolder, training_folder
from billhook.store.checkpoint import model_digest
from billhook.store.directory import complete
from billhook.store.output import absolute, check_apart
from billhook.store.record import history
from billhook.store.shards import weight_bytes
from billhook.text.corpus import source_name


@pinned
def recover(
    model: str | Path, output: str | Path, *, progress: Progress = lambda step: None, **fields: Any
) -> RecoverReport | BlocksReport:
    """Train what a pruned or slimmed model directory has left, and write the result to `output`.

    The keyword arguments are the fields of `RecoverRequest` and the options of the objective. Raises BillhookError
    (nothing written) for an impossible request and JobError for a run that failed.
    """
    request = RecoverRequest.given(model=model, output=output, **fields)
    if request.by == "block":
        return run_blocks(prepare_blocks(request, progress), progress)
    return run(prepare(request, progress), progress)


def prepare(request: RecoverRequest, progress: Progress = lambda step: None) -> RecoverJob:
    """Check everything about a request, cheapest first, and decide how much is trained; nothing is changed."""
    options, _ = OBJECTIVES.configure(request.objective, request.options), request.seconds
    check_text_given(request, True, "Recovering")
    source = Source.of(request.model, absolute(request.output))
    try:
        return _prepared(request, source, options, progress)
    except BaseException:
        source.close()
        raise


def _prepared(request: RecoverRequest, source: Source, options: Mapping[str, Any], progress: Progress) -> RecoverJob:
    """The job of a request whose model is there, dense."""
    check_sharding(request, source)
    seconds = request.seconds
    opened = _opened(request, source)
    found, zeros = _teacher_of(request, opened, source, options), zeros_of(opened.layers)
    path, taught_by = (None, None) if found is None else found
    _check_something_to_do(request, opened, taught_by, options, zeros=any(zeros.values()))
    streamed = path is not None and not request.fsdp and not teacher_fits(path, opened)
    teacher = None if path is None else open_teacher(path, opened, request.model_request(), streamed=streamed)
    windows = draw_windows(request, opened, teacher, progress)
    adapted = add_adapters(request, opened, source)
    opened = changed(opened, samples=windows.samples, batches=split_rows(windows.samples.batch, windows.rows))
    setup = make_setup(request, opened, source, teacher, windows)
    notes = [check_memory(setup, teacher)]
    resumed = unfinished_run(absolute(request.output), resume=request.resume, overwrite=request.overwrite)
    known = {} if resumed is None else resumed.plan
    size = windows.rows * row_length(opened.model, windows.samples.batch)
    if request.windows is not None:
        steps = rows_of(windows.samples.batch) // windows.rows
    elif seconds is None:
        steps = math.ceil((request.tokens or TOKENS) / size)
    else:
        steps = known.get("steps") or min(gather(steps_in(setup, seconds, request.rate is None)))
    setup, rate = replace(setup, steps=steps), known.get("rate", request.rate)
    own = {key: getattr(request, key) for key in IDENTITY} | {"fsdp": world() if request.fsdp else 0}
    run = identity(request.model_request(), opened, options, None, step="recover", **own)
    run |= {"targets": listed(request.targets), "ignore": listed(request.ignore), "teacher": taught_by}
    reference = None if teacher is None else _reference(opened, teacher)
    return RecoverJob(
        request, opened, setup, source, tokens=steps * size, rate=rate, reference=reference, zeros=zeros,
        identity=run, notes=notes + _rounded_note(request.tokens, steps, size), adapted=adapted,
    )  # fmt: skip


def _rounded_note(asked: int | None, steps: int, size: int) -> list[str]:
    """What to say where whole steps take at least a tenth more tokens than were asked for."""
    if asked is None or steps * size <= 1.1 * asked:
        return []
    return [f"Trains on {steps * size:,} tokens instead of {asked:,}: a step has {size:,} of them (--batch-size)."]


def _teacher_of(request: RecoverRequest, opened: Opened, source: Source, options: Mapping[str, Any]) -> Teacher | None:
    """The dense model; None where nobody needs one, and it is not named and not found. Raises BillhookError where the
    output would replace it."""
    output = absolute(request.output)
    try:
        found = find_teacher(opened.history, source.given, request.teacher, output)
    except BillhookError:
        if request.teacher is not None or "teacher" in OBJECTIVES.needs(request.objective, options):
            raise
        return None
    if found is not None:
        check_apart(output, found.path, "dense model")
    return found


def _opened(request: RecoverRequest, source: Source) -> Opened:
    """Open the directory that is trained, with the name, digest and history of the one that was given."""
    before = history(source.given)
    also = () if before is None else before.layers
    opened = open_model(replace(request, model=source.dense).model_request(), streamed=False, also=also)
    if source.grids:
        facts = {**opened.facts, "digest": model_digest(source.given)}
        opened.__dict__.update(facts=facts, history=before)
    return opened


def _check_something_to_do(
    request: RecoverRequest, opened: Opened, teacher: str | None, options: Mapping[str, Any], *, zeros: bool
) -> None:
    """Raise BillhookError for a model without the dense model, whose digest is `teacher`, where it has no zeros or the
    objective needs one."""
    if teacher is None and not zeros:
        raise BillhookError(
            f"{request.model} is dense and has no history: there are no zeros to keep and no model to learn from. "
            "Prune it first, or name the model that it was made from with --teacher DIRECTORY."
        )
    if teacher is None and "teacher" in OBJECTIVES.needs(request.objective, options):
        raise BillhookError(
            f"{request.model} has no history that leads to a dense model, and the objective {request.objective} needs "
            "one: name it with --teacher DIRECTORY, or use --objective text."
        )
    if teacher is not None and teacher == opened.facts["digest"]:
        raise BillhookError(f"{request.model} is its own dense model, which cannot teach it anything: prune it first.")


def _reference(opened: Opened, teacher: PreTrainedModel) -> Reference:
    """The dense model's predictions on the text that is used for nothing else."""
    samples = opened.samples
    assert samples is not None
    assert samples.heldout is not None
    return Reference.of(teacher, samples.heldout, opened.task, source_name(samples.source))


def run(
    job: RecoverJob, progress: Progress = lambda step: None, stopping: Callable[[], bool] = lambda: False
) -> RecoverReport:
    """Train, or go on with a run, and write the output.

    Raises JobError, and Interrupted where the run can be resumed.
    """
    barrier()  # until all processes have checked the output
    begun, request, opened, setup = time.perf_counter(), job.request, job.opened, job.setup
    source, output = job.source.written_like, absolute(request.output)
    room = weight_bytes(source) + 2 * state_bytes(setup)  # the old state goes when the new one is there
    unfinished = training_folder(
        source, output, job.identity, resume=request.resume, overwrite=request.overwrite, room=room,
        stopping=stopping, each=setup.sharded,
    )  # fmt: skip
    with (
        closing(job.source),
        evaluating(setup.model),
        recomputing(setup.model, request.checkpointing),
        unfinished as folder,
        connected(),
    ):
        folder.decide(steps=setup.steps)
        before = None if job.reference is None else job.reference.compare(opened.model)
        rate = _rate(job, folder, progress)
        saved = folder.saved()
        for step in range(0 if saved is None else saved.state.steps):
            progress(f"step {step + 1}")
        save = functools.partial(folder.save, steps=setup.steps)
        done, more = merged(job, train_(setup, rate, saved=saved, save=save, progress=progress))
        _check_zeros(job)
        if setup.sharded:
            gather_(opened.model, setup.model)
        after = None if job.reference is None else job.reference.compare(opened.model)
        races = folder.state.plan.get("races", {})
        tokens = job.tokens // setup.steps * done.state.steps
        zeros, notes = sum(zeros_of(opened.layers).values()), [*job.notes, *_notes(job, done), *more]
        report = RecoverReport(
            output=output, objective=request.objective, tokens=tokens, rate=rate, races=races,
            before=done.before, after=done.after, state=done.state, zeros=zeros,
            seconds=time.perf_counter() - begun, lost_before=before, loss=after, warnings=notes,
        )  # fmt: skip
        folder.complete(functools.partial(_write, job, report))
    return replace(report, seconds=time.perf_counter() - begun)


def _write(job: RecoverJob, report: RecoverReport, folder: Path) -> None:
    """Write the model, or its adapters, to a folder."""
    model, source = job.opened.model, job.source
    if job.request.save == "adapter":
        save_adapter(job, report, folder)
    else:
        source.write(model, job.setup.trained, folder)
        complete(model, source.written_like, folder, record(job, report), card(job.opened.history))


def _rate(job: RecoverJob, folder: TrainingFolder, progress: Progress) -> float:
    """The rate of the request, or of the run that is resumed, or the one that wins a race, which is recorded."""
    if job.rate is not None:
        return job.rate
    before = job.setup.held_out()
    found = race(job.setup, before, progress)
    races = {f"{share:g}": loss if math.isfinite(loss) else None for share, loss in found.items()}
    rate = best_share(before, found)
    folder.decide(rate=rate, races=races)
    return rate


def _check_zeros(job: RecoverJob) -> None:
    """Raise JobError where a weight that was zero is not zero any more."""
    for part in job.setup.trained:
        if back := part.came_back():
            raise JobError(f"{part.name}: {back} weights that were zero have values again. Nothing was written.")


def _notes(job: RecoverJob, done: Recovered) -> list[str]:
    """What a reader of the report should know about the run."""
    notes, rows = [], job.setup.rows * job.setup.steps
    if done.state.diverged:
        back = f"the state of step {done.state.best} came back"
        notes.append(f"The loss was not finite after step {done.state.steps}: {back}.")
    elif done.state.steps < job.setup.steps:
        notes.append(f"Ended after step {done.state.steps} of {job.setup.steps}, because nothing improved any more.")
    if not done.after < done.before:
        notes.append("Nothing improved on what is held out: the output has the weights of the input.")
    if rows > (there := rows_of(job.setup.batch)):
        unit = job.opened.task.unit
        kind = "windows" if unit == "token" else f"{unit}s"
        notes.append(f"There are {there} {kind} to train on, and each was seen {rows / there:.1f} times.")
    return notes
