"""Tune what a pruned model has left one block at a time (`billhook recover --by block`), for models larger than memory.

The dense model is walked, read one block at a time. Each of its blocks first gives the targets for the inputs that the
blocks before it produce by now, then takes the weights of the pruned model's block, which are tuned as `--refine` does
(`billhook.recovery.blockwise`) and written. A stopped run goes on after the last finished block, to the same bytes.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from billhook.architectures.layers import with_linear
from billhook.distributed.collectives import world
from billhook.engine.batch import join_rows, row_length, select_rows, split_rows
from billhook.engine.loop import LayerResult, tuned_results
from billhook.engine.resources import Resources
from billhook.engine.streaming import Stream, open_streamed
from billhook.engine.walk import Block, Progress, walk
from billhook.errors import BillhookError
from billhook.evaluation.quality import Loss, loss_json
from billhook.methods.encoded import count_zeros
from billhook.recovery.block_data import STEP
from billhook.recovery.blockwise import BlockTuner, Refine
from billhook.steps.batch_size import batch_size
from billhook.steps.facts import computed_in, model_facts, versions
from billhook.steps.inputs import listed
from billhook.steps.lost import loss_of
from billhook.steps.partial_output import partial_output
from billhook.steps.record import layer_notes
from billhook.steps.recover_job import TOKENS, RecoverRequest, teacher_facts, trained_layers_of
from billhook.steps.recover_setup import draw_windows, trained_layers
from billhook.steps.recover_source import Source, card
from billhook.steps.request import Opened, calibration_facts, changed, check_text_given, identity, in_memory, open_model
from billhook.steps.teacher import find_teacher
from billhook.store.output import absolute
from billhook.store.record import Record, Step, append_step, history
from billhook.tasks.self_text import is_self


@dataclass(frozen=True)
class BlocksJob:
    """A checked request: the dense model that is walked, with its text, and the pruned one whose blocks it takes, with
    the `facts` that identify it."""

    request: RecoverRequest
    dense: Opened
    source: Source
    pruned: Stream
    facts: dict[str, Any]
    history: Record | None
    identity: dict[str, Any]


@dataclass(frozen=True)
class BlocksReport:
    """What a run did; `notes` say for each block how its held-out loss changed."""

    output: Path
    notes: list[str]
    zeros: int
    seconds: float
    lost_before: Loss | None
    loss: Loss | None

    def to_json(self) -> dict[str, Any]:
        """The content of `recover --by block --json`."""
        return {
            "output": str(self.output),
            "zeros": self.zeros,
            "seconds": round(self.seconds, 3),
            "lost_before": loss_json(self.lost_before),
            "lost": loss_json(self.loss),
            "warnings": self.notes,
        }


def prepare_blocks(request: RecoverRequest, progress: Progress = lambda step: None) -> BlocksJob:
    """Check everything about a request; nothing is changed.

    Raises BillhookError for what only a whole model can be trained with, and for blocks of other shapes.
    """
    if world() > 1:
        raise BillhookError("recover runs in one process: start it without torchrun.")
    check_text_given(request, True, "Recovering")
    source = Source.of(request.model, absolute(request.output))
    try:
        return _prepared(request, source, progress)
    except BaseException:
        source.close()
        raise


def _prepared(request: RecoverRequest, source: Source, progress: Progress) -> BlocksJob:
    """The job of a request whose model is there, dense."""
    if source.grids:
        raise BillhookError(
            f"{source.given} is quantized, and only the scales of a whole model are trained: leave out --by block, or "
            "quantize the dense model again with --recipe best, which tunes scales one block at a time."
        )
    found = history(source.dense)
    teacher = find_teacher(found, source.given, request.teacher, absolute(request.output))
    if teacher is None:
        raise BillhookError(
            f"{request.model} has no history that leads to a dense model: name it with --teacher DIRECTORY."
        )
    path = teacher.path
    walked = replace(request.model_request(), model=path)
    dense = open_model(walked, streamed=True, also=() if found is None else found.layers)
    dense = changed(dense, layers=trained_layers(dense, request))
    dtype, device = dense.model.dtype, str(dense.model.device)
    pruned = open_streamed(source.dense, dense.task.auto_class, dtype=dtype, device=device)
    if dense.resources.stream is None or _shapes(pruned) != _shapes(dense.resources.stream):
        raise BillhookError(f"The blocks of {source.given} and of {path} differ in shape: leave out --by block.")
    dense = _with_text(request, dense, progress)
    own = {key: getattr(request, key) for key in ("by", "tune", "tokens", "length")}
    same = identity(walked, dense, {}, None, step="recover", **own)
    facts = model_facts(source.dense, pruned.model)
    same |= {"targets": listed(request.targets), "ignore": listed(request.ignore), "input": facts["digest"]}
    return BlocksJob(request, dense, source, pruned, facts=facts, history=found, identity=same)


def _with_text(request: RecoverRequest, dense: Opened, progress: Progress) -> Opened:
    """The dense model with as many windows, images or answers as `tokens` asks for, or as there are."""
    model = dense.model
    if is_self(request.calibration):  # a streamed model would read every block for every token
        assert dense.source is not None
        model = in_memory(dense, replace(request.model_request(), model=dense.source)).model
    windows = draw_windows(replace(request, by="model", batch_size=STEP), dense, model, progress)
    batch, length = join_rows([windows.samples.batch, windows.chosen_on]), row_length(dense.model, windows.chosen_on)
    batch = select_rows(batch, slice(math.ceil((request.tokens or TOKENS) / length)))
    samples = replace(windows.samples, batch=batch)
    return changed(dense, samples=samples, batches=split_rows(batch, batch_size(dense.layers, length)))


def _shapes(stream: Stream) -> dict[str, torch.Size]:
    return {name: value.shape for i in range(len(stream.blocks)) for name, value in stream.state(i).items()}


def run_blocks(
    job: BlocksJob, progress: Progress = lambda layer: None, stopping: Callable[[], bool] = lambda: False
) -> BlocksReport:
    """Tune block by block into the output, or resume a run.

    Raises JobError, and Interrupted where the run can be resumed.
    """
    begun, request, dense = time.perf_counter(), job.request, job.dense
    stream, output = dense.resources.stream, absolute(request.output)
    assert stream is not None
    refine = Refine(tune_norms_and_biases=request.tune == "kept+norms", seed=request.seed)
    lost = loss_of(dense, 0)  # there are held-out rows
    unfinished = partial_output(
        stream, job.source.dense, output, job.identity, {},
        resume=request.resume, overwrite=request.overwrite, stopping=stopping,
    )  # fmt: skip
    with closing(job.source), unfinished as partial:
        before = lost(job.pruned.model, Resources(stream=job.pruned))
        done = [result for results in partial.state.results for result in results]
        for result in done:
            progress(result.layer)
        tuner = BlockTuner(refine, dense.model, dense.batches, dense.resources)
        layers = with_linear(dense.model, dense.layers)
        blocks = walk(
            dense.model, dense.batches, layers=layers, dense_outputs=True, start=partial.state.done,
            resources=dense.resources,
        )  # fmt: skip
        for block in blocks:
            results = _tuned(job, tuner, block, progress)
            partial.finished(block, results)
            done += results
        with torch.no_grad():
            for name, value in job.pruned.model.named_parameters():
                if not value.is_meta:
                    dense.model.get_parameter(name).copy_(value)
        after = lost()
        partial.complete(_record(job, refine, done, before, after), published=card(job.history))
    notes = [note for result in done for note in result.notes]
    zeros, seconds = sum(r.zeros for r in done), time.perf_counter() - begun
    return BlocksReport(output, notes, zeros=zeros, seconds=seconds, lost_before=before, loss=after)


@torch.no_grad()
def _tuned(job: BlocksJob, tuner: BlockTuner, block: Block, progress: Progress) -> list[LayerResult]:
    """Give a block of the dense model the weights of the pruned one's, and tune them if any of its layers is chosen."""
    chosen = {layer.name for layer in job.dense.layers}
    block = replace(block, layers=[layer for layer in block.layers if layer.name in chosen])
    if block.layers:
        tuner.note(block)
    with job.pruned.block(block.index):
        for name, value in job.pruned.blocks[block.index].named_parameters():
            block.module.get_parameter(name).copy_(value)
    results = []
    for layer in block.layers:
        zeros = count_zeros(layer.weight)
        results.append(LayerResult(layer.name, layer.shape, planned=0.0, zeros=zeros, zeros_before=zeros, notes=()))
    if not results:
        return []
    resources = job.dense.resources
    with resources.block(block.index if block.last else block.index + 1):
        tuned = tuned_results(tuner.tune_(block), block, results, {})
    for layer in block.layers:
        progress(layer.name)
    return tuned


def _record(
    job: BlocksJob, refine: Refine, results: list[LayerResult], before: Loss | None, after: Loss | None
) -> dict[str, Any]:
    """The content of billhook.json after the run."""
    request = job.request
    made_by: dict[str, Any] = {
        "by": "block",
        "tune": request.tune,
        "epochs": refine.epochs,
        "rate": refine.rate,
        "zeros": {r.layer: r.zeros_before for r in results},
        "seed": request.seed,
        **computed_in(job.dense.model),
        "targets": listed(request.targets),
        "ignore": listed(request.ignore),
        "teacher": teacher_facts(job.history, job.dense.facts["digest"]),
        "calibration": calibration_facts(job.dense),
        "papers": {"objective": "arXiv:2503.04992, arXiv:2402.12419"},
        "lost_before": loss_json(before),
        "lost": loss_json(after),
        "versions": versions(),
    }
    step = Step("recover", None, made_by, job.facts, layer_notes(results))
    return append_step(job.history, step, trained_layers_of(job.dense, job.history, results)).to_json()
