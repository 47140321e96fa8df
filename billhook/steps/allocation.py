"""How `compress` chooses storage types: an allocator of levels, trials on the model, or the types of another file.

Allocators of the registry need no model; what they read is measured, one block at a time, before. `rco` and `auto`
(`billhook.racing.levels`) need the whole model in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.architectures.stacks import has_one_stack
from billhook.engine.batch import rows_of
from billhook.engine.method import Quantization
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.measurement.measure import measure
from billhook.methods.quantize import QUANTIZERS
from billhook.plan.allocators import AUTO
from billhook.plan.level_allocators import ERRORS, LEVEL_ALLOCATORS, WEIGHTS, allocate_levels
from billhook.plan.levels import Levels, types_of
from billhook.plan.plan import Plan
from billhook.racing.allocators import MODEL_ALLOCATORS
from billhook.racing.levels import Chosen, choose_types, columns, loss_by_size, needs
from billhook.registry import Registry, hint
from billhook.steps.earlier_levels import earlier_levels, step_with_levels
from billhook.steps.inputs import ModelRequest
from billhook.steps.levels import Measured, measure_levels
from billhook.steps.like import like_types
from billhook.steps.options import split_options
from billhook.steps.parts import Parts
from billhook.steps.request import Opened, identity, in_memory
from billhook.steps.saved_levels import SavedLevels
from billhook.steps.sizes import Sizes
from billhook.steps.state import partial_folder
from billhook.store.output import absolute
from billhook.trials.heldout import split_samples

LIKE = "like:"
NOTES = "notes"  # in `made_by` of a plan
_SPENT = 0.995  # of the size asked for: files below are explained


@dataclass(frozen=True)
class Allocation:
    """A checked choice of an allocator with all its options, and those of GPTQ that were given beside them.

    `levels` is the output of an earlier run whose measurements are used.
    """

    name: str
    options: Mapping[str, Any]
    quantizer: Mapping[str, Any]
    levels: Path | None = None

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any], levels: str | Path | None = None) -> "Allocation":
        """Raises BillhookError for an unknown allocator or option, naming the nearest, and a file that is not there."""
        registry = _registry(name)
        quantizer, given = split_options(
            options, "gptq", [name] if registry else [], methods=QUANTIZERS, allocating=registry or LEVEL_ALLOCATORS
        )
        if name.startswith(LIKE) and not Path(name[len(LIKE) :]).expanduser().is_file():
            raise BillhookError(f"There is no file {name[len(LIKE) :]}: write like:FILE.gguf.")
        found = cls(name, registry.configure(name, given) if registry else {}, quantizer)
        if levels is None:
            return found
        if ERRORS not in found.needs:
            raise BillhookError(f"The allocator {name} reads no measured levels: leave out --levels.")
        earlier = Path(levels).expanduser()
        step_with_levels(earlier)
        return replace(found, levels=earlier)

    @property
    def file(self) -> Path | None:
        """The file whose types are taken."""
        return Path(self.name[len(LIKE) :]).expanduser() if self.name.startswith(LIKE) else None

    @property
    def recorded(self) -> str:
        """Its name in records, with that of a file but not its folder."""
        return self.name if self.file is None else f"{LIKE}{self.file.name}"

    @property
    def needs(self) -> tuple[str, ...]:
        """What is measured for it."""
        registry = _registry(self.name)
        if registry is not None:
            return registry.needs(self.name, self.options)
        return () if self.file else (ERRORS, WEIGHTS, *columns())

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise BillhookError where what it reads cannot be measured on a model, naming the allocators that can be
        used."""
        if WEIGHTS in self.needs and not has_one_stack(model):
            others = [name for name in LEVEL_ALLOCATORS.names() if WEIGHTS not in needs(name)]
            raise BillhookError(
                f"The allocator {self.name} measures what errors cost in models with one stack of blocks, and "
                f"{type(model).__name__} has several: use --allocator {' or '.join(others)}."
            )

    @property
    def only_levels(self) -> bool:
        """Whether it reads measured levels and nothing else."""
        return not self.on_trial and set(self.needs) == {ERRORS, WEIGHTS}

    @property
    def on_trial(self) -> bool:
        """Whether it needs the model in memory."""
        return self.name == AUTO or _registry(self.name) is MODEL_ALLOCATORS


def _registry(name: str) -> Registry | None:
    """The registry of an allocator, None for `auto` and `like:`; raises BillhookError for an unknown name."""
    if name == AUTO or name.startswith(LIKE):
        return None
    if name in MODEL_ALLOCATORS.names():
        return MODEL_ALLOCATORS
    known = [*LEVEL_ALLOCATORS.names(), *MODEL_ALLOCATORS.names(), AUTO, f"{LIKE}FILE.gguf"]
    if name not in LEVEL_ALLOCATORS.names():
        raise BillhookError(f"Unknown level allocator {name!r:.60}.{hint(name, known)} There are: {', '.join(known)}.")
    return LEVEL_ALLOCATORS


def choose(
    request: ModelRequest,
    opened: Opened,
    sizes: Sizes,
    tied: Sequence[tuple[str, ...]],
    method: Quantization,
    allocation: Allocation,
    *,
    progress: Progress = lambda line: None,
) -> Chosen:
    """The types of all tensors under `sizes`; `request` says how the model is opened, `method` how it is quantized.

    The errors of all types are kept on disk until the run has begun, so that a killed one goes on.
    """
    shapes = {layer.name: layer.shape for layer in opened.layers} | dict(sizes.outside)
    menus = {**sizes.menus, **sizes.outside_menus}
    levels, notes = Levels(shapes, menus, sizes.budget - sizes.fixed, list(sizes.outside), tied), list[str]()
    if ERRORS in allocation.needs:
        if allocation.levels is not None:
            digest = opened.facts["digest"]
            found, notes = earlier_levels(allocation.levels, digest, sizes.menus, sizes.outside_menus)
        else:
            found = _measure(request, opened, sizes, method, progress)
        errors = {**found.errors, **found.losses}
        measured = {name: list(errors[name]) for name in menus}
        levels = replace(levels, menus=measured, errors=errors, weights=found.costs)
        if notes and levels.least > levels.budget:
            raise BillhookError(f"The size cannot be met with what {allocation.levels} measured. {notes[0]}")
    wanted = [name for name in allocation.needs if name not in (ERRORS, WEIGHTS)]
    table = measure(
        opened.model, wanted, batches=opened.batches, layers=opened.layers, resources=opened.resources,
        progress=progress,
    )  # fmt: skip
    levels = replace(levels, table=table)
    if not allocation.on_trial:
        plan = allocate_levels(levels, allocation.name, **allocation.options)
        chosen = Chosen(plan, loss_by_size(levels, sizes.fixed) if levels.errors else {})
        return _noted(chosen, notes, levels, sizes.fixed)
    assert opened.samples is not None
    whole = in_memory(opened, request)
    split = split_samples(whole.model, opened.samples, rows_of(opened.batches[0]), request.seed)
    quick = replace(method, options={**method.options, "sweeps": 0})
    chosen = choose_types(
        whole.model, whole.layers, split, levels, quick, allocator=allocation.name, options=allocation.options,
        fixed=sizes.fixed, progress=progress,
    )  # fmt: skip
    return _noted(chosen, notes, levels, sizes.fixed)


def _unspent(levels: Levels, plan: Plan, fixed: int) -> list[str]:
    """Why the file is more than half a percent below the budget, beside which it takes `fixed` bytes; nothing where it
    is not."""
    types, budget = types_of(plan), levels.budget
    size = levels.total(types)
    if fixed + size >= _SPENT * (fixed + budget):
        return []
    most = sum(max(levels.bytes(group, t) for t in levels.menu(group)) for group in levels.groups)
    if size == most:
        return ["The file is smaller than asked, because every tensor has the largest type that it may have."]

    def gains(group: tuple[str, ...]) -> bool:
        own, loss = levels.bytes(group, types[group[0]]), levels.loss(group, types[group[0]])
        return any(levels.bytes(group, t) > own and levels.loss(group, t) < loss for t in levels.menu(group))

    spent = levels.errors and not any(map(gains, levels.groups))
    finer = "no larger types were measured to lose less" if spent else "the next larger types do not fit"
    return [f"The file is smaller than asked, because {finer}."]


def _noted(chosen: Chosen, notes: list[str], levels: Levels, fixed: int) -> Chosen:
    """With notes for the report in the plan, which a run that is resumed reads too."""
    notes = [*notes, *_unspent(levels, chosen.plan, fixed)]
    made_by = {**chosen.plan.made_by, NOTES: notes} if notes else chosen.plan.made_by
    return replace(chosen, plan=replace(chosen.plan, made_by=made_by))


def _measure(request: ModelRequest, opened: Opened, sizes: Sizes, method: Quantization, progress: Progress) -> Measured:
    menus = {"layers": sizes.menus, "outside": sizes.outside_menus}
    same = identity(request, opened, {"scales": str(method.scale_dtype)}, None) | menus
    kept = SavedLevels(partial_folder(absolute(str(request.output))), same)
    try:
        return measure_levels(
            opened, sizes.menus, sizes.outside_menus, method.scale_dtype, kept, seed=request.seed, progress=progress
        )
    except BillhookError:
        kept.forget()
        raise


def choose_like(opened: Opened, sizes: Sizes, parts: Parts, file: Path) -> Chosen:
    """The types of `file`; `parts` are the layers' places on disk.

    Raises BillhookError where they do not fit the model or the size.
    """
    stream = opened.resources.stream
    assert stream is not None
    assert opened.source is not None
    on_disk = {name: tuple(stored.entry.shape) for name, stored in stream.source.items()}
    wanted = {layer: [part.tensor for part in several] for layer, several in parts.items()}
    types = like_types(file, opened.source, on_disk, wanted | {name: [name] for name in sizes.outside})
    shapes = {layer.name: layer.shape for layer in opened.layers} | dict(sizes.outside)
    levels = Levels(shapes, {name: [type] for name, type in types.items()}, 1, list(sizes.outside))
    total = levels.total(types)
    if sizes.fixed + total > sizes.budget:
        raise BillhookError(
            f"With the types of {file} the result has up to {sizes.fixed + total:,} bytes, and {sizes.budget:,} were "
            "asked for: leave out the size, or choose another allocator."
        )
    made_by = {"allocator": f"{LIKE}{file.name}", "options": {}, "paper": "the types of another file"}
    return Chosen(replace(levels, budget=total).plan(types, made_by), {})
