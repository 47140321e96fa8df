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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from billhook.architectures.context_memory import ContextMemory
from billhook.architectures.layers import Layer
from billhook.engine.method import Quantization
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.export.compressed_tensors import fused
from billhook.plan.plan import Plan
from billhook.plan.storage import bits
from billhook.racing.levels import Chosen
from billhook.steps.allocation import NOTES, Allocation, choose, choose_like
from billhook.steps.earlier_levels import step_with_levels
from billhook.steps.inputs import GgufInputs
from billhook.steps.levels import measured_layers
from billhook.steps.lost import Lost
from billhook.steps.parts import Parts, check_matrices, layer_parts
from billhook.steps.quantization_config import check_opens
from billhook.steps.quantize import open_blocks, prepare, run
from billhook.steps.quantize_job import QuantizeJob, QuantizeReport, QuantizeRequest, Recipe
from billhook.steps.request import Opened, check_text_given, draw_text
from billhook.steps.saved_levels import resume_advice
from billhook.steps.sizes import Size, Sizes, allowed_types
from billhook.steps.state import check_same_run, partial_folder, unfinished_run
from billhook.steps.types import check_target, scale_dtype
from billhook.store.files import sha256
from billhook.store.layout import LEVELS
from billhook.store.output import absolute, check_room

_LOSS_BY_SIZE = "loss_by_size"  # in `made_by` of a plan
Target = Literal["gguf", "transformers", "vllm"]


@dataclass(frozen=True)
class CompressRequest(GgufInputs):
    """The parameters of a run: one of `size`, `bits`, `ratio` and `fit`, with its `context` (see
    `billhook.steps.sizes.Size`); `types` limits the choice, of embeddings and head too. `allocator` makes it: one
    of `billhook ls level-allocators`, or `like:FILE.gguf`, which needs no size. `options` are those of GPTQ and of the
    allocator. `levels` is the output of an earlier run on the same model, whose measured errors are used again. `units`
    are kinds that may go, too (`billhook.steps.compress_units`). The others are those of `quantize`."""

    model: str | Path
    output: str | Path
    size: str | int | None = None
    bits: float | None = None
    ratio: float | None = None
    fit: str | int | None = None
    context: int | None = None
    target: Target = "gguf"
    types: Sequence[str] = ()
    allocator: str = "curves"
    levels: str | Path | None = None
    recipe: Recipe = "good"
    units: str | Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target != "gguf" and (self.template, self.split_size) != (None, None):
            raise BillhookError("A template and split files are for GGUF files (--for gguf).")

    def quantizing(self) -> QuantizeRequest:
        """The request of the step that quantizes, without a plan."""
        same = QuantizeRequest.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        return QuantizeRequest(type="", **{name: getattr(self, name) for name in same})


@dataclass(frozen=True)
class CompressReport:
    """What a run did; `budget` is the size asked for, `loss_by_size` the predicted loss of other budgets relative to
    it, and `memory` what a context takes beside the file, where both must fit in memory."""

    quantized: QuantizeReport
    budget: int
    loss_by_size: Mapping[float, float]
    memory: ContextMemory | None

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
            "loss_by_size": {str(k): v for k, v in self.loss_by_size.items()},
            "context": None if self.memory is None else asdict(self.memory),
        }


@dataclass(frozen=True)
class CheckedCompress:
    """A request that can be met: how it will be quantized, the model (without its text if a run is resumed), the
    layers' places on disk, what may be chosen (`sized` if a size was given), what the choice depends on, and the plan
    of the run to resume."""

    request: CompressRequest
    allocation: Allocation
    quantizing: QuantizeRequest
    opened: Opened
    parts: Parts
    sizes: Sizes
    sized: bool
    asked: Mapping[str, Any]
    plan: Plan | None

    @property
    def steps(self) -> int | None:
        """How many steps `decide` reports: errors and costs of layers, embeddings and head; None if not known."""
        if self.plan is not None or self.allocation.levels is not None or not self.allocation.only_levels:
            return None
        return 2 * len(measured_layers(self.opened.layers)) + len(self.sizes.outside)


@dataclass(frozen=True)
class CompressJob:
    """A checked request with its plan; the others as in `CompressReport`."""

    quantizing: QuantizeJob
    budget: int
    loss_by_size: Mapping[float, float]
    memory: ContextMemory | None


def check(request: CompressRequest, progress: Progress = lambda line: None) -> CheckedCompress:
    """Check a request, cheapest first, and draw its text; with `resume`, the plan is that of the stopped run."""
    allocation = Allocation.of(request.allocator, request.options, request.levels)
    given = Size(request.size, request.bits, request.ratio, request.fit, request.context)
    sized = allocation.file is None or given != Size()
    given = given if sized else Size(ratio=1.0)
    given.check(request.target)
    if allocation.file and (request.target != "gguf" or request.types):
        raise BillhookError("like:FILE takes the types of a GGUF file: leave out --types, and use --for gguf.")
    types = allowed_types(request.target, request.types)
    check_target(request.target == "gguf")
    quantizing = replace(request.quantizing(), options=allocation.quantizer)
    check_text_given(quantizing, True, "Choosing types")
    opened = open_blocks(quantizing)
    allocation.check_model(opened.model)
    parts = layer_parts(opened)
    if request.target != "gguf":
        check_matrices(opened.layers, parts)
    sizes = Sizes.of(given, opened, parts, types, request.target, form=request.gguf_form)
    if request.target != "gguf":
        check_opens(opened, parts, {name: menu[0] for name, menu in sizes.menus.items()})
    asked: dict[str, Any] = {"target": request.target, "bytes": sizes.budget, "types": types}
    asked |= {"allocator": allocation.recorded, "options": dict(allocation.options)}
    asked |= {"file": allocation.file and sha256(allocation.file)}
    asked |= {"levels": allocation.levels and step_with_levels(allocation.levels)[0].made_by["calibration"]}
    plan = _stopped_plan(request, asked)
    if plan is None:
        output = absolute(request.output)
        check_room(output, sizes.most_room(opened, parts, request.target))
        opened = draw_text(opened, quantizing.model_request(), progress)
    return CheckedCompress(request, allocation, quantizing, opened, parts, sizes, sized, asked, plan)


def decide(checked: CheckedCompress, progress: Progress = lambda line: None) -> CompressJob:
    """Choose the types, unless the run that is resumed has chosen them."""
    sizes, known = checked.sizes, checked.plan
    kept = partial_folder(absolute(checked.request.output)) / LEVELS
    with resume_advice(kept, "the same command measures the rest"):
        chosen = _chosen(checked, progress) if known is None else _chosen_before(known)
    made_by = {**chosen.plan.made_by, "request": checked.asked}
    if chosen.loss_by_size:
        made_by[_LOSS_BY_SIZE] = {str(factor): ratio for factor, ratio in chosen.loss_by_size.items()}
    plan = replace(chosen.plan, made_by=made_by)
    job = prepare(replace(checked.quantizing, plan=plan), opened=checked.opened)
    job = replace(job, notes=[*job.notes, *plan.made_by.get(NOTES, [])])
    budget = sizes.budget if checked.sized else sizes.fixed + int(plan.budget.value)
    return CompressJob(job, budget, chosen.loss_by_size, sizes.memory)


def _chosen_before(plan: Plan) -> Chosen:
    """The types that a stopped run has chosen."""
    return Chosen(plan, {float(factor): ratio for factor, ratio in plan.made_by.get(_LOSS_BY_SIZE, {}).items()})


def _chosen(checked: CheckedCompress, progress: Progress) -> Chosen:
    """The types, where no stopped run has chosen them."""
    allocation, sizes, opened = checked.allocation, checked.sizes, checked.opened
    if allocation.file:
        return choose_like(opened, sizes, checked.parts, allocation.file)
    tied = _experts(opened.layers)
    tied += fused(layer.name for layer in opened.layers) if checked.request.target == "vllm" else []
    method = Quantization("gptq", allocation.quantizer, scale_dtype(opened, checked.parts))
    return choose(checked.quantizing.model_request(), opened, sizes, tied, method, allocation, progress=progress)


def run_compress(
    job: CompressJob,
    progress: Progress = lambda line: None,
    stopping: Callable[[], bool] = lambda: False,
    lost: Lost | None = None,
) -> CompressReport:
    """Quantize with the chosen types; `lost` and what is raised are as of `billhook.steps.quantize.run`."""
    return CompressReport(run(job.quantizing, progress, stopping, lost), job.budget, job.loss_by_size, job.memory)


def _stopped_plan(request: CompressRequest, asked: Mapping[str, Any]) -> Plan | None:
    """The plan of the run to resume, if there is one; raises BillhookError unless it was made for what is `asked`."""
    output = absolute(request.output)
    state = unfinished_run(output, resume=request.resume, overwrite=request.overwrite)
    if state is None:
        return None
    plan = Plan.from_json(state.plan, str(partial_folder(output)))
    made = (plan.made_by.get("request") or {}) | {key: state.identity.get(key) for key in request.selection}
    check_same_run(made, {**asked, **request.selection}, partial_folder(output))
    return plan


def _experts(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """The experts that are one tensor of a file."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if layer.expert is not None:
            groups.setdefault(layer.name.rpartition(".")[0], []).append(layer.name)
    return [tuple(names) for names in groups.values()]
