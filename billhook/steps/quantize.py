"""Quantize a model directory into a new one, block by block, in three steps: check, plan, run.

The plan gives every chosen layer a storage type. Types intB/GROUP become a compressed-tensors directory, which stock
`transformers` opens, and GGUF types one .gguf file for llama.cpp, in which embeddings and head are quantized too.
Everything else keeps the source's bytes. A run that is stopped can be resumed to the same bytes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from billhook.ambient import pinned
from billhook.architectures.layers import Layer
from billhook.distributed.collectives import world
from billhook.engine.loop import LayerResult, apply_plan_
from billhook.engine.method import Quantization
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.export import compressed_tensors, ggml_tensors
from billhook.export.gguf import write_gguf
from billhook.methods.encoded import Encoded
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.grid import Quantized
from billhook.methods.quantize.nearest import nearest
from billhook.methods.statistics import LayerStats
from billhook.plan.plan import Plan, load_plan
from billhook.recovery.block_scales import ScaleTuner
from billhook.reports.quantized_card import publish_quantized
from billhook.steps.block_files import BlockFiles, Form
from billhook.steps.given_imatrix import NOTE, imatrix_stats
from billhook.steps.lost import Lost, loss_of
from billhook.steps.partial_output import PartialOutput, partial_output
from billhook.steps.parts import Parts, check_matrices, layer_parts, part_types, transposed
from billhook.steps.quantization_config import check_opens, configuration
from billhook.steps.quantize_job import QuantizeJob, QuantizeReport, QuantizeRequest, record
from billhook.steps.request import Opened, check_stays, check_text_given, draw_text, identity, open_model
from billhook.steps.state import check_same_run, partial_folder, unfinished_run
from billhook.steps.types import (
    block_bytes,
    check_target,
    file_bytes,
    file_facts,
    full_name,
    is_ggml,
    outside_of,
    outside_parameter,
    plan_types,
    scale_dtype,
    uniform_plan,
)
from billhook.store.files import sha256
from billhook.store.output import absolute, check_room
from billhook.store.shards import read_shard, result_bytes, weight_bytes, write_index


@pinned
def quantize(
    model: str | Path, type: str, output: str | Path, *, progress: Progress = lambda layer: None, **fields: Any
) -> QuantizeReport:
    """Quantize a model directory (or hub name) to one storage type, such as int4/64 or q4_k, and write it to `output`.

    The keyword arguments are the fields of `QuantizeRequest` and the options of the quantizer. Raises BillhookError
    (nothing written) for an impossible request and JobError for a run that failed.
    """
    request = QuantizeRequest.given(model=model, type=type, output=output, **fields)
    return run(prepare(request, progress), progress)


def prepare(
    request: QuantizeRequest, progress: Progress = lambda layer: None, opened: Opened | None = None
) -> QuantizeJob:
    """Check everything about a request, cheapest first, and make its plan; nothing is changed.

    `opened` is the model of the request, with or without its text, where that is open already.
    """
    method, given = _method_and_plan(request)
    best = request.recipe == "best"
    reads_text = (bool(method.observed) or best) and request.imatrix is None
    check_text_given(request, reads_text, "The recipe best" if best else f"Quantizing with {request.quantizer}")
    opened = open_blocks(request) if opened is None else opened
    plan, notes = uniform_plan(full_name(request.type), opened.layers) if given is None else (given, [])
    plan.check({layer.name: layer.shape for layer in opened.layers})
    types = plan_types(plan)
    if len({is_ggml(t) for t in types.values()}) > 1:
        raise BillhookError("The plan mixes GGUF types with types intB/GROUP: a file holds one kind.")
    ggml, parts = any(map(is_ggml, types.values())), layer_parts(opened)
    if not ggml:
        check_matrices(opened.layers, parts)
        check_opens(opened, parts, types)
    method = replace(method, scale_dtype=scale_dtype(opened, parts))
    outside = outside_of(opened, plan, request.embeddings) if ggml else {}
    on_disk = part_types(parts, types) | outside
    room = block_bytes(opened, on_disk)
    room += file_bytes(opened, on_disk, request.quantizer, request.gguf_form) if ggml else 0
    check_resumed(request, _identity(request, opened, method, plan, outside), room)
    known = given_stats(request, opened, parts)
    if reads_text and opened.samples is None:
        opened = draw_text(opened, request.model_request(), progress)
    run = _identity(request, opened, method, plan, outside)
    check_resumed(request, run, room)
    return QuantizeJob(
        request, opened, plan, method, parts=parts, outside=outside, identity=run,
        notes=notes + [NOTE] * (known is not None), room=room, known=known,
    )  # fmt: skip


def _method_and_plan(request: QuantizeRequest) -> tuple[Quantization, Plan | None]:
    """The quantizer with its options, and the given plan of storage types; what needs no model is checked."""
    if world() > 1:
        raise BillhookError("quantize runs in one process: start it without torchrun.")
    QUANTIZERS.check(request.quantizer)
    options = dict(request.options)
    if request.imatrix is not None:
        if request.quantizer != "round":
            raise BillhookError("An importance matrix is for --quantizer round: the others need calibration text.")
        if request.recipe == "best":
            raise BillhookError("An importance matrix replaces the text that --recipe best needs: give one of the two.")
        options |= {"weighted": True}
    method = Quantization(request.quantizer, QUANTIZERS.configure(request.quantizer, options))
    given = load_plan(request.plan) if isinstance(request.plan, str | Path) else request.plan
    if (given is None) == (not request.type):
        raise BillhookError("Give either a storage type, such as int4 or q4_k, or a plan of storage types.")
    if given is not None:
        method.check(given)
    type = full_name(request.type) if given is None else next(iter(plan_types(given).values()))
    if request.embeddings and not (is_ggml(type) and is_ggml(request.embeddings)):
        raise BillhookError(
            f"Embeddings cannot be {request.embeddings:.40} beside layers of {type}: only .gguf files have a type for "
            "them, one of the GGUF types in billhook ls types."
        )
    check_target(is_ggml(type))
    if not is_ggml(type) and (request.template, request.split_size) != (None, None):
        raise BillhookError(f"A template and split files are for GGUF files, and {type} is a type of another form.")
    return method, given


def given_stats(request: QuantizeRequest, opened: Opened, parts: Parts) -> Mapping[str, LayerStats] | None:
    """The statistics of the importance matrix of a request, if it has one."""
    if request.imatrix is None:
        return None
    assert opened.source is not None
    return imatrix_stats(Path(request.imatrix).expanduser(), opened.source, opened.layers, parts)


def open_blocks(request: QuantizeRequest) -> Opened:
    """Open the model of a request one block at a time, without its text."""
    for file in (request.template, request.imatrix):
        check_stays(file, absolute(request.output))
    opened = open_model(request.model_request(), streamed=True, room=lambda source: 0)
    if opened.resources.stream is None or opened.source is None:
        raise BillhookError(f"{request.model} cannot be read one block at a time, so it cannot be quantized.")
    return opened


def _identity(
    request: QuantizeRequest, opened: Opened, method: Quantization, plan: Plan, outside: Mapping[str, str]
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    same = identity(request.model_request(), opened, method.options, plan)
    form: dict[str, Any] = {"split": request.gguf_form["split"]}
    for key in ("template", "imatrix"):
        file = getattr(request, key)
        form[key] = None if file is None else sha256(Path(file).expanduser())
    same |= {"step": "quantize", "quantizer": request.quantizer, "recipe": request.recipe}
    return same | {"outside": dict(outside), **form}


def check_resumed(request: QuantizeRequest, run: Mapping[str, Any], room: int) -> None:
    """Raise BillhookError for a stopped run that is not `run` (a text that is not read yet may be any), and DiskFull
    where the disk lacks room for the rest of `room` bytes."""
    output = absolute(request.output)
    folder, state = partial_folder(output), unfinished_run(output, resume=request.resume, overwrite=request.overwrite)
    if state is not None:
        known = state.identity if run["calibration"] else state.identity | {"calibration": None}
        check_same_run(known, run, folder)
        room -= sum(path.stat().st_size for path in folder.iterdir())
    check_room(output, room)


def run(
    job: QuantizeJob,
    progress: Progress = lambda layer: None,
    stopping: Callable[[], bool] = lambda: False,
    lost: Lost | None = None,
) -> QuantizeReport:
    """Quantize block by block into the output, or resume a run; `lost` says what was lost, by default against the
    model of the job.

    Raises JobError, and Interrupted where the run can be resumed.
    """
    start, request, opened, source = time.perf_counter(), job.request, job.opened, job.opened.source
    stream, output = opened.resources.stream, absolute(request.output)
    assert stream is not None
    assert source is not None

    def outside(name: str) -> Quantized:
        return nearest(stream.source[name].read().float(), LayerStats(0, 0), job.grids[name])

    form: Form = ggml_tensors if job.ggml else compressed_tensors
    files = BlockFiles(stream, job.grids, form, outside, transposed(job.parts), tuned=request.recipe == "best")
    lost = lost or loss_of(opened, request.drawing.held_out)
    unfinished = partial_output(
        stream, source, output, job.identity, job.plan.to_json(), resume=request.resume, overwrite=request.overwrite,
        stopping=stopping, files=files, room=job.room,
    )  # fmt: skip
    with unfinished as partial:
        for name in job.outside:
            decoded = files.form.read(name, job.grids[name], [read_shard(partial.folder / files.files[0])])
            outside_parameter(opened.model, name).copy_(decoded.decode(torch.float32))
        results = _blocks(job, files, partial, progress)
        loss = lost(opened.model, opened.resources)
        made_record = record(job, results, loss)
        partial.complete(made_record, _finish(job, files, source), published=publish_quantized)
    return QuantizeReport(
        output=output, layers=results, bits=job.bits, size=result_bytes(output), source_size=weight_bytes(source),
        seconds=time.perf_counter() - start, loss=loss, warnings=made_record["steps"][-1]["warnings"],
    )  # fmt: skip


def _blocks(job: QuantizeJob, files: BlockFiles, partial: PartialOutput, progress: Progress) -> list[LayerResult]:
    """Quantize the blocks that are not finished yet; the results of all."""
    opened, best = job.opened, job.request.recipe == "best"
    before = [result for results in partial.state.results for result in results]
    for result in before:
        progress(result.layer)

    def keep(layer: Layer, weight: Quantized) -> None:
        for part in job.parts[layer.name]:
            files.add(part, weight)

    tuner = ScaleTuner(opened.model, opened.batches, opened.resources, job.request.seed, keep) if best else None

    def made(layer: Layer, encoded: Encoded) -> None:
        assert isinstance(encoded, Quantized)
        keep(layer, encoded)
        if tuner is not None:
            tuner.made(layer, encoded)

    return before + apply_plan_(
        opened.model, job.plan, job.method, opened.batches, layers=opened.layers, resources=opened.resources,
        start=partial.state.done, known=job.known, tuner=tuner, progress=progress, made=made,
        finished=partial.finished,
    )  # fmt: skip


def _finish(job: QuantizeJob, files: BlockFiles, source: Path) -> Callable[[Path], Mapping[str, Any]]:
    """What completes the weight files in a folder, and returns new entries of config.json."""

    def compressed(folder: Path) -> Mapping[str, Any]:
        write_index(folder, files.files)
        return {"quantization_config": configuration(job.opened.model, job.parts, job.grids)}

    def gguf(folder: Path) -> Mapping[str, Any]:
        quantized = {name: (type, data) for name, type, data in files.raw(folder)}
        output = absolute(job.request.output)
        facts = file_facts(job.opened, job.request.quantizer)
        changed = [folder / name for name in files.files] if files.tuned else []
        form = job.request.gguf_form
        write_gguf(source, folder / f"{output.name}.gguf", quantized, facts=facts, changed=changed, **form)
        del quantized
        for name in files.files:
            (folder / name).unlink()
        return {}

    return gguf if job.ggml else compressed
