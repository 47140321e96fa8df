"""Quantize a model directory into a new one, block by block, in three steps: check, plan, run.

The plan gives every chosen layer a storage type. Types intB/GROUP become a compressed-tensors directory, which stock
`transformers` opens. Everything else keeps the source's bytes. A run that is stopped can be resumed to the same bytes.
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
from billhook.engine.loop import apply_plan_
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
from billhook.plan.plan import load_plan
from billhook.steps.block_files import BlockFiles
from billhook.steps.lost import loss_of
from billhook.steps.partial_output import partial_output
from billhook.steps.quantize_job import QuantizeJob, QuantizeReport, QuantizeRequest, record
from billhook.steps.request import Opened, open_request
from billhook.steps.resolve import identity
from billhook.steps.types import (
    EMBEDDINGS,
    check_target,
    file_bytes,
    file_facts,
    full_name,
    is_ggml,
    layer_tensors,
    outside_parameter,
    outside_types,
    plan_types,
    scale_dtype,
    uniform_plan,
)
from billhook.store.shards import read_shard, result_bytes, weight_bytes, write_index


@pinned
def quantize(
    model: str | Path, type: str, output: str | Path, *, progress: Progress = lambda layer: None, **fields: Any
) -> QuantizeReport:
    """Quantize a model directory (or hub name) to one storage type, such as int4/64, and write it to `output`.

    The keyword arguments are the fields of `QuantizeRequest` and the options of the quantizer. Raises BillhookError
    (nothing written) for an impossible request and JobError for a run that failed.
    """
    known = {key: value for key, value in fields.items() if key in QuantizeRequest.__dataclass_fields__}
    options = {**(fields.get("options") or {}), **{key: fields[key] for key in fields.keys() - known.keys()}}
    return run(prepare(QuantizeRequest(model, type, output, **{**known, "options": options}), progress), progress)


def prepare(
    request: QuantizeRequest, progress: Progress = lambda layer: None, opened: Opened | None = None
) -> QuantizeJob:
    """Check everything about a request, cheapest first, and make its plan; nothing is changed.

    The model and its text are opened unless they are `opened` already.
    """
    if world() > 1:
        raise BillhookError("quantize runs in one process: start it without torchrun.")
    QUANTIZERS.check(request.quantizer)
    method = Quantization(request.quantizer, QUANTIZERS.configure(request.quantizer, request.options))
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
    if opened is None:
        who = f"Quantizing with {request.quantizer}"
        opened = open_request(request.opening(), bool(method.observed), who, streamed=True, progress=progress)
    stream = opened.resources.stream
    if stream is None or opened.source is None:
        raise BillhookError(f"{request.model} cannot be read one block at a time, so it cannot be quantized.")
    plan, notes = uniform_plan(type, opened.layers) if given is None else (given, [])
    plan.check({layer.name: layer.shape for layer in opened.layers})
    if len({is_ggml(t) for t in plan_types(plan).values()}) > 1:
        raise BillhookError("The plan mixes GGUF types with types intB/GROUP: a file holds one kind.")
    tensors = layer_tensors(opened)
    method = replace(method, scale_dtype=scale_dtype(opened, tensors))
    outside = dict(request.outside)
    if is_ggml(type):
        outside = outside or outside_types(opened, request.embeddings or EMBEDDINGS)
        # to find out now whether the model has a form in such files
        file_bytes(opened, {tensors[layer]: t for layer, t in plan_types(plan).items()} | outside, request.quantizer)
    run = identity(request.opening(), opened, method.options, plan, None)
    run |= {"step": "quantize", "quantizer": request.quantizer, "outside": outside}
    return QuantizeJob(request, opened, plan, method, tensors, outside, run, notes)


def run(
    job: QuantizeJob, progress: Progress = lambda layer: None, stopping: Callable[[], bool] = lambda: False
) -> QuantizeReport:
    """Quantize block by block into the output, or resume a run.

    Raises JobError, and Interrupted where the run can be resumed.
    """
    start, request, opened, source = time.perf_counter(), job.request, job.opened, job.opened.source
    stream, output = opened.resources.stream, Path(request.output).expanduser().resolve()
    assert stream is not None
    assert source is not None

    def outside(name: str) -> Quantized:
        return nearest(stream.source[name].read().float(), LayerStats(0, 0), job.grids[name])

    files = BlockFiles(stream, job.grids, ggml_tensors if job.ggml else compressed_tensors, outside)
    may: dict[str, Any] = {"resume": request.resume, "overwrite": request.overwrite}
    lost = loss_of(opened, request.opening().drawing.held_out)
    with partial_output(
        stream, source, output, job.identity, job.plan.to_json(), **may, stopping=stopping, files=files
    ) as partial:
        for name in job.outside:
            decoded = files.form.read(name, job.grids[name], [read_shard(partial.folder / files.files[0])])
            outside_parameter(opened.model, name).copy_(decoded.decode(torch.float32))
        before = [result for results in partial.state.results for result in results]
        for result in before:
            progress(result.layer)

        def made(layer: Layer, encoded: Encoded) -> None:
            assert isinstance(encoded, Quantized)
            files.add(job.tensors[layer.name], encoded)

        results = before + apply_plan_(
            opened.model, job.plan, job.method, opened.batches, layers=opened.layers, resources=opened.resources,
            start=partial.state.done, progress=progress, made=made, finished=partial.finished,
        )  # fmt: skip
        loss = lost()
        made_record = record(job, results, loss)
        partial.complete(made_record, _finish(job, files, source))
    bits = 8 * job.plan.bytes(job.shapes) / sum(out * columns for out, columns in job.shapes.values())
    warnings, seconds = made_record["steps"][-1]["warnings"], time.perf_counter() - start
    return QuantizeReport(output, results, bits, result_bytes(output), weight_bytes(source), seconds, loss, warnings)


def _finish(job: QuantizeJob, files: BlockFiles, source: Path) -> Callable[[Path], Mapping[str, Any]]:
    """What completes the weight files in a folder, and returns new entries of config.json."""

    def compressed(folder: Path) -> Mapping[str, Any]:
        write_index(folder, files.files)
        return {"quantization_config": _configuration(job)}

    def gguf(folder: Path) -> Mapping[str, Any]:
        quantized = {name: (type, data) for name, type, data in files.raw(folder)}
        output = Path(job.request.output).expanduser().resolve()
        facts = file_facts(job.opened, job.request.quantizer)
        write_gguf(source, folder / f"{output.name}.gguf", quantized, facts=facts)
        del quantized
        for name in files.files:
            (folder / name).unlink()
        return {}

    return gguf if job.ggml else compressed


def _configuration(job: QuantizeJob) -> dict[str, Any]:
    """The `quantization_config` of config.json; every linear layer that is not quantized is named in it."""
    linear = {name for name, m in job.opened.model.named_modules() if isinstance(m, torch.nn.Linear)}
    types = {layer: job.grids[tensor] for layer, tensor in job.tensors.items()}
    return compressed_tensors.configuration(types, linear - types.keys())
