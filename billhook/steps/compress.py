"""Compress: meet a size with the least loss, by a storage type for every tensor.

    check -> fixed bytes of the file -> errors of every layer and type -> types under the budget -> quantize

What every tensor would lose at every type is measured on some of the calibration text (`billhook.steps.levels`), and
the types with the least sum of losses are found exactly, or as another allocator says (`billhook.steps.allocation`);
then the model is quantized (`billhook.steps.quantize`). One block at a time is in memory. Everything in the file
counts. Targets:

* `gguf`: one .gguf file for llama.cpp; embeddings and head get types of their own;
* `transformers`: a compressed-tensors directory, 2 to 8 bits; embeddings and head keep their bits;
* `vllm`: the same with 4 and 8 bits, where the layers that vLLM fuses (q, k, v and gate, up) share a type.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from billhook.ambient import pinned
from billhook.architectures.layers import Layer
from billhook.engine.method import Quantization
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.plan.plan import Plan
from billhook.plan.storage import bits
from billhook.racing.levels import Chosen
from billhook.steps.allocation import Allocation, choose, choose_like
from billhook.steps.quantize import QuantizeReport, QuantizeRequest, prepare, run
from billhook.steps.quantize_job import Inputs
from billhook.steps.request import open_request
from billhook.steps.sizes import Size, Sizes, allowed_types
from billhook.steps.state import check_same_run, partial_folder, unfinished_run
from billhook.steps.types import check_target, layer_tensors, scale_dtype

Target = Literal["gguf", "transformers", "vllm"]
_ANY = 1 << 62  # bytes: no limit
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True)
class CompressRequest(Inputs):
    """The parameters of a run: one of `size`, `bits` and `ratio` (see `billhook.steps.sizes.Size`); `types` limits the
    choice, and `allocator` makes it: one of `billhook ls level-allocators`, or `like:FILE.gguf`, which needs no size.
    The others are those of `quantize`."""

    model: str | Path
    output: str | Path
    size: str | int | None = None
    bits: float | None = None
    ratio: float | None = None
    target: Target = "gguf"
    types: Sequence[str] = ()
    allocator: str = "curves"
    options: Mapping[str, Any] = field(default_factory=dict)  # of GPTQ and of the allocator

    def quantizing(self) -> QuantizeRequest:
        """The request of the step that quantizes, without a plan."""
        same = QuantizeRequest.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        return QuantizeRequest(type="", **{name: getattr(self, name) for name in same})


@dataclass(frozen=True)
class CompressReport:
    """What a run did; `budget` is the size asked for, `outlook` the predicted loss of other budgets relative to it."""

    quantized: QuantizeReport
    budget: int
    outlook: Mapping[float, float]

    @property
    def counts(self) -> dict[str, int]:
        """How many layers have each type, the largest type first."""
        found = Counter(r.type or "" for r in self.quantized.layers)
        return {type: found[type] for type in sorted(found, key=bits, reverse=True)}

    def to_json(self) -> dict[str, Any]:
        """The content of `compress --json`."""
        return {
            **self.quantized.to_json(),
            "budget": self.budget,
            "outlook": {str(k): v for k, v in self.outlook.items()},
        }


@pinned
def compress(
    model: str | Path, output: str | Path, *, progress: Progress = lambda line: None, **fields: Any
) -> CompressReport:
    """Compress a model directory (or hub name) to a size; the keyword arguments are the fields of `CompressRequest`.

    Raises BillhookError (nothing written) for an impossible request, with the least possible size where that is the
    reason, and JobError for a run that failed.
    """
    known = {key: value for key, value in fields.items() if key in CompressRequest.__dataclass_fields__}
    options = {**(fields.get("options") or {}), **{key: fields[key] for key in fields.keys() - known.keys()}}
    return run_compress(CompressRequest(model, output, **{**known, "options": options}), progress)


def run_compress(request: CompressRequest, progress: Progress = lambda line: None) -> CompressReport:
    """Choose types and quantize; with `resume`, with the types that the stopped run chose."""
    types = allowed_types(request.target, request.types)
    check_target(request.target == "gguf")
    allocation, given = (
        Allocation.of(request.allocator, request.options),
        Size(request.size, request.bits, request.ratio),
    )
    sized = given != Size()
    if allocation.file and (request.target != "gguf" or request.types):
        raise BillhookError("like:FILE takes the types of a GGUF file: leave out --types, and use --for gguf.")
    quantizing = replace(request.quantizing(), options=allocation.quantizer)
    opened = open_request(quantizing.opening(), True, "Choosing types", streamed=True, progress=progress)
    tensors = layer_tensors(opened)
    method = Quantization("gptq", allocation.quantizer, scale_dtype(opened, tensors))
    sizes = Sizes.of(given if sized or not allocation.file else Size(_ANY), opened, tensors, types, request.target)
    asked: dict[str, Any] = {"target": request.target, "bytes": sizes.budget, "types": types}
    asked |= {"allocator": request.allocator, "options": dict(allocation.options)}
    stopped = _stopped_plan(request, asked)
    if stopped is not None:
        chosen = Chosen(stopped, {})
    elif allocation.file:
        chosen = choose_like(opened, sizes, tensors, allocation.file, sized)
    else:
        tied = _tied(opened.layers) if request.target == "vllm" else ()
        chosen = choose(request, opened, sizes, tied, method, allocation, progress=progress)
    plan = replace(chosen.plan, made_by={**chosen.plan.made_by, "request": asked})
    quantizing = replace(quantizing, plan=plan, outside=plan.made_by.get("outside", {}))
    job = prepare(quantizing, progress, opened)
    budget = sizes.budget if sized else sizes.fixed + int(plan.budget.value)
    return CompressReport(run(job, progress), budget, chosen.outlook)


def _stopped_plan(request: CompressRequest, asked: Mapping[str, Any]) -> Plan | None:
    """The plan of the run to resume, if there is one; raises BillhookError unless it was made for what is `asked`."""
    output = Path(request.output).expanduser().resolve()
    state = unfinished_run(output, resume=request.resume, overwrite=request.overwrite)
    if state is None:
        return None
    plan = Plan.from_json(state.plan, str(partial_folder(output)))
    check_same_run(plan.made_by.get("request") or {}, asked, partial_folder(output))
    return plan


def _tied(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """The layers that vLLM fuses."""
    groups: dict[tuple[str, int], list[str]] = {}
    for layer in layers:
        parent, _, last = layer.name.rpartition(".")
        for number, names in enumerate(_FUSED):
            if last in names:
                groups.setdefault((parent, number), []).append(layer.name)
    return [tuple(names) for names in groups.values()]
