"""A request to quantize a model, its checked job, what a run reports, and its step in billhook.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from billhook.engine.loop import LayerResult
from billhook.engine.method import Quantization
from billhook.evaluation.quality import Loss, loss_json
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.ggml import GGML
from billhook.methods.quantize.grid import Grid
from billhook.methods.quantize.grids import grid_of
from billhook.methods.statistics import LayerStats
from billhook.plan.plan import Plan
from billhook.steps.facts import computed_in, versions
from billhook.steps.inputs import GgufInputs, ModelRequest, listed
from billhook.steps.parts import Parts, part_types, where
from billhook.steps.record import layer_notes, left_alone, refilled_notes, without_folders
from billhook.steps.request import Opened, calibration_facts
from billhook.steps.types import is_ggml, plan_types
from billhook.store.layout import RECORD
from billhook.store.record import Step, append_step, read_record
from billhook.store.shards import result_bytes, weight_bytes
from billhook.store.sinks import left_over

Recipe = Literal["good", "best"]
SPILL_GIB = 0.25  # of hidden states in memory; the others are on disk, and reading them takes little time


@dataclass(frozen=True)
class QuantizeRequest(GgufInputs):
    """The parameters of a quantizing run; the field names are those of the command line.

    `type` is one storage type for all layers, or "" with a `plan` of types. `embeddings` is that of embeddings and head
    in a GGUF file; a plan that `compress` made gives each of them one. With `published`, windows are drawn as in the
    released code of the papers. `imatrix` is an importance matrix file of llama.cpp instead of text. The recipe `best`
    also tunes the scales and norms of every block (`billhook.recovery.block_scales`).
    """

    model: str | Path
    type: str
    output: str | Path
    plan: str | Path | Plan | None = None
    embeddings: str = ""
    quantizer: str = "gptq"
    imatrix: str | Path | None = None
    recipe: Recipe = "good"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        # of a frozen object, which nobody has yet; llama.cpp writes types in capitals
        self.__dict__.update(type=self.type.lower(), embeddings=self.embeddings.lower())

    def model_request(self) -> ModelRequest:
        """The model and the text to open."""
        return self._model_request(spill_gib=SPILL_GIB)


@dataclass(frozen=True)
class QuantizeJob:
    """A checked request with its plan.

    `parts` are the places of the layers on disk, `outside` the types of embeddings and head by their names,
    `room` the bytes that the run needs on the disk, and `known` the statistics of an importance matrix.
    """

    request: QuantizeRequest
    opened: Opened
    plan: Plan
    method: Quantization
    parts: Parts
    outside: Mapping[str, str]
    identity: Mapping[str, Any]
    notes: list[str]
    room: int
    known: Mapping[str, LayerStats] | None = None

    @property
    def ggml(self) -> bool:
        """Whether the output is a GGUF file."""
        return any(is_ggml(type) for type in plan_types(self.plan).values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the layers."""
        return {layer.name: layer.shape for layer in self.opened.layers}

    @property
    def bits(self) -> float:
        """Stored bits a weight of the layers, everything counted."""
        return 8 * self.plan.bytes(self.shapes) / sum(out * columns for out, columns in self.shapes.values())

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grids of all quantized tensors by their names on disk."""
        types = part_types(self.parts, plan_types(self.plan)) | dict(self.outside)
        return {name: grid_of(type, self.method.scale_dtype) for name, type in types.items()}


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did; `bits` counts everything that is stored for the quantized layers, per weight."""

    output: Path
    layers: list[LayerResult]
    bits: float
    size: int
    source_size: int
    seconds: float
    loss: Loss | None
    warnings: list[str]

    @classmethod
    def of(cls, output: Path, source: Path) -> Self:
        """What the run that made a directory from `source` reported, but for its time."""
        record = read_record(output / RECORD)
        step = record.steps[-1]
        plan, results = Plan.from_json(step.plan or {}, RECORD), list[LayerResult]()
        for name, spec in plan.weights.items():
            facts = record.layers[name]
            shape, notes = (facts["shape"][0], facts["shape"][1]), tuple(facts["notes"])
            result = LayerResult(
                name, shape, planned=0.0, zeros=facts["zeros"], zeros_before=0, notes=notes, error=facts.get("error"),
                type=spec.type,
            )  # fmt: skip
            results.append(result)
        bits = 8 * plan.bytes({r.layer: r.shape for r in results}) / sum(r.n for r in results)
        loss = None if step.made_by.get("lost") is None else Loss(**step.made_by["lost"])
        return cls(
            output=output, layers=results, bits=bits, size=result_bytes(output), source_size=weight_bytes(source),
            seconds=0.0, loss=loss, warnings=step.warnings,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The content of `quantize --json`."""
        return {
            "output": str(self.output),
            "bits": self.bits,
            "bytes": self.size,
            "source_bytes": self.source_size,
            "seconds": round(self.seconds, 3),
            "lost": loss_json(self.loss),
            "warnings": self.warnings,
            "layers": {r.layer: {"type": r.type, "error": r.error, "zeros": r.zeros} for r in self.layers},
        }


def record(job: QuantizeJob, results: Sequence[LayerResult], loss: Loss | None) -> dict[str, Any]:
    """The content of billhook.json after the run."""
    request, opened, before = job.request, job.opened, job.opened.history
    known, layers = {} if before is None else before.layers, left_alone(before, opened)
    for name, facts in layers.items() if job.ggml else ():  # which are in no file where zeros are counted again
        facts["zeros"] = known[name]["zeros"]
    for r in results:
        earlier = known.get(r.layer, {})
        facts = {key: value for key, value in earlier.items() if key == "sparsity"}
        notes = [*r.notes, *refilled_notes(r.refilled, earlier)]
        facts |= {"shape": list(r.shape), "zeros": r.zeros, "notes": notes, "error": r.error, "type": r.type}
        layers[r.layer] = facts | where(job.parts[r.layer])
    made_by = {
        "quantizer": request.quantizer,
        "recipe": request.recipe,
        "outside": dict(job.outside),
        "quantizer_options": without_folders(job.method.options),
        "seed": request.seed,
        **computed_in(opened.model),
        **request.selection,
        "stacks": listed(request.stacks) or [opened.task.stacks],
        "imatrix": job.identity["imatrix"],
        "calibration": calibration_facts(opened),
        "papers": {"quantizer": QUANTIZERS.paper(request.quantizer)},
        "lost": loss_json(loss),
        "versions": versions(),
    }
    notes = [*job.notes, *layer_notes(results), *_zeros_lost(results), *left_over(opened.model, opened.source)]
    step = Step("quantize", job.plan.to_json(), made_by, opened.facts, notes)
    return append_step(before, step, layers).to_json()


def _zeros_lost(results: Sequence[LayerResult]) -> list[str]:
    """A note on the weights that were zero and whose types have no zero, in all layers together."""
    lost = [r for r in results if r.refilled]
    if not lost:
        return []
    total, types = sum(r.refilled for r in lost), sorted({r.type or "" for r in lost})
    keep = ", ".join(name for name, grid in GGML.items() if grid.has_zero)
    return [
        f"{total:,} weights that were zero have values again, in {len(lost)} layers, such as {lost[0].layer}: "
        f"{', '.join(types)} cannot store every zero. These types keep zeros: {keep}."
    ]
