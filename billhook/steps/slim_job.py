"""A request to remove units of a model, its checked job, what a run reports, and its step in billhook.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from billhook.architectures.layers import Layer, find_layers
from billhook.architectures.stacks import blocks_of
from billhook.architectures.units import Unit
from billhook.engine.loop import LayerResult
from billhook.engine.removal import Removal
from billhook.evaluation.quality import Loss, loss_json
from billhook.methods.structured import STRUCTURED
from billhook.plan.plan import Plan
from billhook.plan.unit_counts import Shape
from billhook.steps.block_choice import BlockChoice
from billhook.steps.facts import computed_in, versions
from billhook.steps.inputs import Inputs, ModelRequest
from billhook.steps.record import layer_notes, place, without_folders
from billhook.steps.request import Opened, calibration_facts
from billhook.steps.slim_files import Smaller
from billhook.store.record import Step, append_step
from billhook.store.sinks import left_over


@dataclass(frozen=True)
class SlimRequest(Inputs):
    """The parameters of a run that removes units; the field names are those of the command line.

    `remove` is the fraction of the parameters in blocks that goes, or there is a `plan` that says how many parts of
    each unit stay. `units` are the kinds of units that may go, by default those that lose least on text. `allocator`
    (by default `uniform`, or `auto` with `units="auto"`) says how much each unit loses. In the `shape` `uniform` every
    unit of a kind loses as much, and only the split between kinds is the allocator's; `per-layer` is the default where
    an allocator is given. `method` chooses channels and heads, `experts` experts, `drop_by` blocks. Without `stacks`,
    units of all stacks go.
    """

    model: str | Path
    output: str | Path
    remove: float | None = None
    units: str | Sequence[str] = "auto"
    allocator: str = ""
    shape: Shape | Literal[""] = ""
    plan: str | Path | Plan | None = None
    method: str = "obs"
    experts: str = "obs"
    drop_by: BlockChoice = "kl"
    options: Mapping[str, Any] = field(default_factory=dict)

    def model_request(self) -> ModelRequest:
        """The model and the text to open."""
        return self._model_request(stacks=self.stacks or "all")


@dataclass(frozen=True)
class SlimJob:
    """A checked request with its plan; `config` are the entries of config.json that change.

    `parameters` are those of each block, before.
    """

    request: SlimRequest
    opened: Opened
    units: Sequence[Unit]
    plan: Plan
    removal: Removal
    smaller: Smaller
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    parameters: Sequence[int]
    notes: list[str]

    @property
    def consumers(self) -> list[Layer]:
        """The layers that read what units of channels and heads produce."""
        return [unit.consumer for unit in self.units if unit.consumer is not None]

    @property
    def steps(self) -> int:
        """The number of progress calls of `run`: one per unit, one more where gradients are computed first."""
        return len(self.units) + (len(self.consumers) if self.removal.gradient else 0)

    @property
    def removed(self) -> int:
        """The parameters in the blocks that are not stored any more."""
        left = blocks_of(self.smaller.stream.model).values()
        return sum(self.parameters) - sum(p.numel() for block in left for p in block.parameters())

    @property
    def padding(self) -> int:
        """The parameters that the plan removes, and that are stored as zeros, because all blocks have one width."""
        return sum((self.smaller.counts[u.name] - self.plan.units[u.name]) * u.parameters for u in self.units)


@dataclass(frozen=True)
class SlimReport:
    """What a run did; `kept` says what stayed of each unit, `dropped` which blocks went, by number.

    Of the parameters in blocks, the fraction `removed` went, and the fraction `padding` is stored as zeros.
    """

    output: Path
    kept: Mapping[str, list[int]]
    counts: Mapping[str, int]
    dropped: Sequence[int]
    removed: float
    padding: float
    size: int
    source_size: int
    seconds: float
    loss: Loss | None
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """The content of `slim --json`."""
        return {
            "output": str(self.output),
            "removed": self.removed,
            "padding": self.padding,
            "bytes": self.size,
            "source_bytes": self.source_size,
            "seconds": round(self.seconds, 3),
            "lost": loss_json(self.loss),
            "warnings": self.warnings,
            "units": {name: {"kept": len(kept), "of": self.counts[name]} for name, kept in self.kept.items()},
            "dropped": list(self.dropped),
        }


def kept_parts(job: SlimJob, results: Sequence[LayerResult]) -> dict[str, list[int]]:
    """The numbers of the parts that stayed, by unit."""
    by_consumer = {unit.consumer.name: unit.name for unit in job.units if unit.consumer is not None}
    return {by_consumer.get(r.layer, r.layer): list(r.kept or ()) for r in results}


def record(job: SlimJob, results: Sequence[LayerResult], loss: Loss | None) -> dict[str, Any]:
    """The content of billhook.json after the run; the layers are those of the smaller model."""
    request, opened, before = job.request, job.opened, job.opened.history
    made_by = {
        "method": request.method,
        "experts": request.experts if any(unit.kind == "experts" for unit in job.units) else None,
        "dropped": [i for i in range(len(job.parameters)) if i not in job.smaller.blocks],
        "method_options": without_folders(job.removal.options),
        "kept": kept_parts(job, results),
        "parts": {unit.name: unit.count for unit in job.units},
        "consumers": {
            name: _stored(job, unit, unit.groups.shape[1])
            for unit in job.units
            if unit.consumer is not None and unit.groups is not None
            if (name := _renamed(job, unit.consumer.name)) is not None
        },
        "removed": job.removed / sum(job.parameters),
        "padding": job.padding / sum(job.parameters),
        "seed": request.seed,
        **computed_in(opened.model),
        "calibration": calibration_facts(opened),
        "papers": {"method": STRUCTURED.paper(request.method)},
        "lost": loss_json(loss),
        "versions": versions(),
    }
    notes = [*job.notes, *layer_notes(results), *left_over(opened.model, opened.source)]
    step = Step("slim", job.plan.to_json(), made_by, opened.facts, notes)
    return {**append_step(before, step, {}).to_json(), "layers": _layers(job, results)}


def _stored(job: SlimJob, unit: Unit, columns: int) -> dict[str, Any]:
    return {"unit": unit.name, "columns": columns, "stored": job.smaller.counts[unit.name]}


def _renamed(job: SlimJob, layer: str) -> str | None:
    """The name in the smaller model of a layer, or of a unit; None for the layer of an expert that is gone."""
    old, new = job.smaller.source.prefixes, job.smaller.stream.prefixes
    block = next(i for i, prefix in enumerate(old) if layer.startswith(f"{prefix}."))
    experts = job.smaller.kept.get(f"{layer.rpartition('.experts.')[0]}:experts")
    name, _, number = layer.rpartition(".")
    if experts is not None and number.isdigit():
        if not experts[int(number)]:
            return None
        layer = f"{name}.{int(experts[: int(number)].sum())}"
    return new[job.smaller.blocks.index(block)] + layer.removeprefix(old[block])


def _layers(job: SlimJob, results: Sequence[LayerResult]) -> dict[str, Any]:
    """The entries of the layers of the smaller model."""
    made, layers = {_renamed(job, r.layer): r for r in results}, {}
    for layer in find_layers(job.smaller.stream.model):
        r = made.get(layer.name)
        if r is None and layer.expert is not None and layer.parameter == "down_proj":
            mixture = made.get(f"{layer.name.rpartition('.experts.')[0]}:experts")
            r = mixture if mixture is not None and mixture.updated else None
        facts: dict[str, Any] = {"shape": list(layer.shape), "notes": [] if r is None else list(r.notes)}
        facts |= {"error": None if r is None else r.error, "updated": r is not None}
        layers[layer.name] = facts | place(layer)
    return layers
