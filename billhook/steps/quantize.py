"""Quantize a model directory into a new one, block by block, in three steps: check, plan, run.

The plan gives every chosen layer a storage type. Types intB/GROUP become a compressed-tensors directory, which stock
`transformers` opens. Everything else keeps the source's bytes. A run that is stopped can be resumed to the same bytes.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import world
from billhook.engine.loop import LayerResult, apply_plan_
from billhook.engine.method import Quantization
from billhook.engine.walk import Block, Progress
from billhook.errors import BillhookError
from billhook.export import compressed_tensors
from billhook.methods.encoded import Encoded
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.grid import Quantized
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.scalar import Scalar
from billhook.plan.plan import Budget, Plan
from billhook.plan.spec import Spec
from billhook.plan.storage import stored_bytes
from billhook.steps.block_files import BlockFiles, check_places
from billhook.steps.partial_output import partial_output
from billhook.steps.record import place, without_folders
from billhook.steps.request import Opened, Request, calibration_facts, listed, open_request
from billhook.steps.resolve import identity
from billhook.store.locate import locate_on_disk
from billhook.store.record import Step, append_step
from billhook.store.shards import weight_bytes
from billhook.text.given import Given

GROUPS = (64, 32, 16, 8)  # of a type without a group: the first that divides a layer's columns


@dataclass(frozen=True)
class QuantizeRequest:
    """The parameters of a quantizing run; the field names are those of the command line.

    With `published`, windows are drawn as in the released code of the papers.
    """

    model: str | Path
    type: str
    output: str | Path
    quantizer: str = "gptq"
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Given | None = None
    samples: int = 128
    length: int | None = None
    bos: str = "auto"
    published: bool = False
    batch_size: int | None = None
    seed: int = 0
    targets: str | Sequence[str] = ()
    ignore: str | Sequence[str] = ()
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False
    resume: bool = False
    trust_remote_code: bool = False

    def opening(self) -> Request:
        """The fields that say how a model and its text are opened."""
        given = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name in Request.__dataclass_fields__
        }
        return Request(**(given | {"options": {}}))


@dataclass(frozen=True)
class QuantizeJob:
    """A checked request with its plan; `tensors` are the names on disk of the layers' weights."""

    request: QuantizeRequest
    opened: Opened
    plan: Plan
    method: Quantization
    tensors: Mapping[str, str]
    identity: Mapping[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did; `bits` counts everything that is stored for the quantized layers, per weight."""

    output: Path
    layers: list[LayerResult]
    bits: float
    size: int
    source_size: int
    seconds: float
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """The content of `quantize --json`."""
        return {
            "output": str(self.output),
            "bits": self.bits,
            "bytes": self.size,
            "source_bytes": self.source_size,
            "seconds": round(self.seconds, 3),
            "warnings": self.warnings,
            "layers": {r.layer: {"type": r.type, "error": r.error, "zeros": r.zeros} for r in self.layers},
        }


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


def prepare(request: QuantizeRequest, progress: Progress = lambda layer: None) -> QuantizeJob:
    """Check everything about a request, cheapest first, and make its plan; nothing is changed."""
    if world() > 1:
        raise BillhookError("quantize runs in one process: start it without torchrun.")
    compressed_tensors.check_installed()
    QUANTIZERS.check(request.quantizer)
    method = Quantization(request.quantizer, QUANTIZERS.configure(request.quantizer, request.options))
    _types(request.type, 64)
    opened = open_request(
        request.opening(), bool(method.observed), f"Quantizing with {request.quantizer}", streamed=True,
        progress=progress,
    )  # fmt: skip
    stream = opened.resources.stream
    if stream is None or opened.source is None:
        raise BillhookError(f"{request.model} cannot be read one block at a time, so it cannot be quantized.")
    tensors = _tensors(opened)
    dtypes = {stream.source[name].dtype for name in tensors.values()}
    method = replace(method, scale_dtype=torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float16)
    plan, notes = _plan(request, opened.layers)
    method.check(plan)
    run = identity(request.opening(), opened, method.options, plan, None)
    run |= {"step": "quantize", "quantizer": request.quantizer}
    return QuantizeJob(request, opened, plan, method, tensors, run, notes)


def _types(type: str, columns: int) -> tuple[str, bool]:
    """The type of a layer with so many columns, and whether its group is another than the one asked for."""
    name, slash, group = type.partition("/")
    if not slash and name.startswith("int"):
        group = str(GROUPS[0])
    wanted = f"{name}/{group}" if group else name
    grid = grid_of(wanted)
    if columns % grid.block == 0:
        return wanted, False
    fitting = next((g for g in GROUPS if g < grid.group and columns % g == 0), None)
    if fitting is None or not isinstance(grid, Scalar):
        raise BillhookError(f"a layer with {columns} columns cannot be stored as {wanted}")
    return f"{name}/{fitting}", True


def _plan(request: QuantizeRequest, layers: Sequence[Layer]) -> tuple[Plan, list[str]]:
    """The type of every layer, and a note where the group is smaller than the one asked for."""
    weights, smaller = {}, []
    for layer in layers:
        try:
            name, changed = _types(request.type, layer.shape[1])
        except BillhookError as error:
            raise BillhookError(f"{layer.name}: {error}. Leave it out with --ignore {layer.name}.") from None
        weights[layer.name] = Spec(type=name)
        smaller += [(layer.name, name)] if changed else []
    total = sum(
        stored_bytes(spec.type or "", layer.shape) for layer, spec in zip(layers, weights.values(), strict=True)
    )
    notes = []
    if smaller:
        name, type = smaller[0]
        notes = [f"{len(smaller)} layers, such as {name}, are stored as {type}: their columns do not divide by more."]
    return Plan(Budget("bytes", total), weights, made_by={"allocator": "uniform", "type": request.type}), notes


def _tensors(opened: Opened) -> dict[str, str]:
    """The names on disk of the layers' weights; raises BillhookError where one is not a matrix of its own there."""
    stream = opened.resources.stream
    assert stream is not None
    facts = {layer.name: {"shape": list(layer.shape), **place(layer)} for layer in opened.layers}
    return check_places(locate_on_disk(opened.model, facts, stream.source))


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
    grids = {name: _scalar(job, layer) for layer, name in job.tensors.items()}
    files = BlockFiles(stream, grids)
    may: dict[str, Any] = {"resume": request.resume, "overwrite": request.overwrite}
    with partial_output(
        stream, source, output, job.identity, job.plan.to_json(), **may, stopping=stopping, files=files
    ) as partial:
        before = [result for results in partial.state.results for result in results]
        for result in before:
            progress(result.layer)

        def made(layer: Layer, encoded: Encoded) -> None:
            assert isinstance(encoded, Quantized)
            files.add(job.tensors[layer.name], encoded)

        def finished(block: Block, results: list[LayerResult]) -> None:
            partial.finished(block, results)

        results = before + apply_plan_(
            opened.model, job.plan, job.method, opened.batches, layers=opened.layers, resources=opened.resources,
            start=partial.state.done, progress=progress, made=made, finished=finished,
        )  # fmt: skip
        record = _record(job, results)
        partial.complete(record, {"quantization_config": _configuration(job, grids)})
    shapes = {layer.name: layer.shape for layer in opened.layers}
    bits = 8 * job.plan.bytes(shapes) / sum(out * columns for out, columns in shapes.values())
    size, before_size = weight_bytes(output), weight_bytes(source)
    warnings, seconds = record["steps"][-1]["warnings"], time.perf_counter() - start
    return QuantizeReport(output, results, bits, size, before_size, seconds, warnings)


def _scalar(job: QuantizeJob, layer: str) -> Scalar:
    grid = grid_of(job.plan.weights[layer].type or "", job.method.scale_dtype)
    assert isinstance(grid, Scalar)
    return grid


def _configuration(job: QuantizeJob, grids: Mapping[str, Scalar]) -> dict[str, Any]:
    """The `quantization_config` of config.json; every linear layer that is not quantized is named in it."""
    linear = {name for name, m in job.opened.model.named_modules() if isinstance(m, torch.nn.Linear)}
    types = {layer: grids[tensor] for layer, tensor in job.tensors.items()}
    return compressed_tensors.configuration(types, linear - types.keys())


def _record(job: QuantizeJob, results: Sequence[LayerResult]) -> dict[str, Any]:
    """The content of billhook.json after the run."""
    request, opened, before = job.request, job.opened, job.opened.history
    known = {} if before is None else before.layers
    layers = {}
    for r in results:
        facts = {key: value for key, value in known.get(r.layer, {}).items() if key == "sparsity"}
        facts |= {"shape": list(r.shape), "zeros": r.zeros, "notes": list(r.notes), "error": r.error, "type": r.type}
        layers[r.layer] = facts | {"tensor": job.tensors[r.layer], "index": None, "transposed": False}
    made_by = {
        "quantizer": request.quantizer,
        "quantizer_options": without_folders(job.method.options),
        **{key: getattr(request, key) for key in ("seed", "dtype", "device")},
        "targets": listed(request.targets),
        "ignore": listed(request.ignore),
        "calibration": None if opened.samples is None else calibration_facts(opened),
        "papers": {"quantizer": QUANTIZERS.paper(request.quantizer)},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
    }  # fmt: skip
    notes = [*job.notes, *(f"{r.layer}: {note}" for r in results for note in r.notes)]
    step = Step("quantize", job.plan.to_json(), made_by, opened.facts, notes)
    return append_step(before, step, layers).to_json()
