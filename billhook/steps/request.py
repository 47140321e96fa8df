"""A request for a pruning run, and opening the model and the calibration text that it names."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from billhook.ambient import check_model
from billhook.architectures.layers import Layer, check_finite, find_layers
from billhook.architectures.selection import reach, select_layers
from billhook.architectures.sources import resolve
from billhook.architectures.stacks import add_stacks, added_stacks, blocks_in, blocks_of
from billhook.distributed.collectives import rows_per_batch
from billhook.engine.activation_store import SPILL_GIB
from billhook.engine.batch import Batch, row_length, rows_of, split_rows
from billhook.engine.dead_blocks import dead_blocks
from billhook.engine.gradient_file import Gradients
from billhook.engine.method import Group, Prefix, Rounding
from billhook.engine.resources import Resources
from billhook.engine.streaming import open_streamed
from billhook.errors import BillhookError
from billhook.plan import recipes
from billhook.plan.allocators import BudgetScope
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.plan.table import Table
from billhook.recovery.blockwise import Refining
from billhook.steps.batch_size import batch_size
from billhook.steps.facts import model_facts
from billhook.steps.state import partial_folder, unfinished_run
from billhook.store.arguments import check_fields
from billhook.store.checkpoint import check_directory, load
from billhook.store.layout import WRITTEN
from billhook.store.output import check_output
from billhook.store.record import Record, history
from billhook.store.shards import weight_bytes
from billhook.store.sinks import SameLayout, choose_sink
from billhook.tasks.base import Drawing, Home, Progress, Samples, Task
from billhook.tasks.opening import task_of, task_of_config
from billhook.tasks.self_text import is_self, saved_windows
from billhook.text.given import Given

UNCHECKED = ("model", "calibration")  # fields whose types are checked, and explained, where they are opened


@dataclass(frozen=True)
class Request:
    """The parameters of a pruning run, named as on the command line.

    `recipe` (by default `good`) fills in what is not given, see `billhook.plan.recipes`. With `published`, zeros are
    counted, samples drawn and gradients accumulated as in the papers' code. `calibration` is a SOURCE's name, or data.
    """

    model: str | Path | PreTrainedModel
    sparsity: float | None = None
    output: str | Path | None = None
    recipe: str = ""
    criterion: str = ""
    allocator: str = ""
    pattern: str = "unstructured"
    options: Mapping[str, Any] = field(default_factory=dict)
    plan: str | Path | Plan | None = None
    table: str | Path | Table | None = None
    gradients: str | Path | Gradients | None = None
    calibration: Given | None = None
    samples: int = 128
    length: int | None = None
    batch_size: int | None = None
    seed: int = 0
    targets: str | Sequence[str] = ()
    ignore: str | Sequence[str] = ()
    stacks: str | Sequence[str] = ()
    budget: BudgetScope = "each"
    group: Group | None = None
    published: bool = False
    bos: str = "auto"
    skip_unreadable: bool = False
    refine: Refining | Literal[""] = ""
    prefix: Prefix | Literal[""] = ""
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False
    resume: bool = False
    spill_gib: float = SPILL_GIB
    pack: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self, but=UNCHECKED)
        planned, structured = self.plan is not None, Pattern.parse(self.pattern).structured
        found = recipes.chosen(
            self.recipe, self.criterion, self.allocator, self.refine, structured=structured, planned=planned
        )
        filled = {key: getattr(found, key) for key in ("criterion", "allocator", "refine")}
        filled |= {"group": self.group or found.group, "prefix": self.prefix or found.prefix}
        filled |= {"options": {**found.options, **self.options}}
        if self.sparsity is None and not planned:
            filled["sparsity"] = found.sparsity
        self.__dict__.update(filled)  # of a frozen object, which nobody has yet

    @property
    def followed(self) -> str | None:
        """The recipe that the run follows unchanged; None for another method, or a given plan."""
        name = self.recipe or recipes.DEFAULT
        if self.plan is not None:
            return None
        own, keys = Request(self.model, None, recipe=name, pattern=self.pattern), ("criterion", "allocator", "refine")
        same = all(getattr(own, key) == getattr(self, key) for key in (*keys, "options", "group", "prefix"))
        return name if same and own.sparsity in (None, self.sparsity) else None

    @property
    def rounding(self) -> Rounding:
        """How zeros are counted (`billhook.methods.masks`)."""
        return "floor" if self.published else "exact"

    @property
    def drawing(self) -> Drawing:
        """How calibration samples are drawn."""
        return Drawing(self.samples, self.length, self.seed, "papers" if self.published else "packed", self.bos)


@dataclass(frozen=True)
class Opened:
    """The loaded and checked model and samples of a request; `samples` is None and `batches` empty if not needed.

    `dead` are the blocks that no output depends on, by number, with their names; `layers` are without theirs.
    """

    source: Path | None
    model: PreTrainedModel
    task: Task
    resources: Resources
    layers: list[Layer]
    samples: Samples | None
    batches: list[Batch]
    dead: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`model_facts` of the model, cached because the digest of the files takes time."""
        return model_facts(self.source, self.model)

    @cached_property
    def history(self) -> Record | None:
        """The record of the model, or None."""
        return None if self.source is None else history(self.source)


def open_request(
    request: Request, needs_samples: bool, who: str, *, streamed: bool = False, progress: Progress = lambda step: None
) -> Opened:
    """Load the model, select its layers, and draw the calibration samples if `needs_samples`; cheapest checks first.

    With `streamed`, a model directory is opened with one block at a time in memory. Raises BillhookError for an
    impossible request; `who` needs the samples in its message.
    """
    check_text_given(request, needs_samples, who)
    opened = open_model(request, streamed=streamed)
    return _without_dead_blocks(draw_text(opened, request, progress)) if needs_samples else opened


def check_text_given(request: Request, needed: bool, who: str) -> None:
    """Raise BillhookError where text is `needed`, by `who`, and the request names none, or an empty name."""
    if isinstance(request.calibration, str) and not request.calibration.strip():
        raise BillhookError("The name that --calibration gives is empty: is a variable of the shell unset?")
    if needed and request.calibration is None:
        raise BillhookError(
            f"{who} needs activations: give text with --calibration FILE.txt, FILE.jsonl, TOKENS.safetensors or hub:c4 "
            "(images for an image model). With --calibration self: the model writes it; real text is better."
        )


def open_model(
    request: Request, *, streamed: bool, room: Callable[[Path], int] = weight_bytes, also: Collection[str] = ()
) -> Opened:
    """Load the model of a request and select its layers, and convolutions in `also`. Writing needs `room(source)`."""
    if request.batch_size is not None and request.batch_size < 1:
        raise BillhookError(f"The batch size must be at least 1, got {request.batch_size}.")
    source, model, resources = _open_model(request, streamed, room)
    check_model(model, streamed=resources.streamed)
    task = task_of(model)
    targets, ignore = listed(request.targets), listed(request.ignore)
    inside = set(chain(*blocks_in(model, listed(request.stacks) or [task.stacks]).values()))
    found = [layer for layer in find_layers(model, convolutions=bool(targets or also)) if layer.block in inside]
    layers = select_layers(model, found, targets, ignore, also=also)
    _check_weights(model, resources)
    return Opened(source, model, task, resources, layers, None, [])


def draw_text(opened: Opened, request: Request, progress: Progress = lambda step: None) -> Opened:
    """The same with the calibration samples of the request."""
    samples = _draw(request, opened.source, opened.model, opened.task, opened.resources.streamed, progress)
    length = row_length(opened.model, samples.batch)
    size = rows_per_batch(len(samples), request.batch_size or batch_size(opened.layers, length))
    return changed(opened, samples=samples, batches=split_rows(samples.batch, size))


def _without_dead_blocks(opened: Opened) -> Opened:
    """The same without the layers of blocks that no output depends on; raises as `dead_blocks` does."""
    dead = dead_blocks(opened.model, opened.batches[0], {layer.block for layer in opened.layers})
    if not (live := [layer for layer in opened.layers if layer.block not in dead]):
        raise BillhookError("No output depends on the chosen blocks: there is nothing to prune.")
    return changed(opened, layers=live, dead=dead)


def changed(opened: Opened, **changes: Any) -> Opened:
    """The same with other fields; what is known about the files, which takes time, is kept."""
    found = replace(opened, **changes)
    found.__dict__.update({key: opened.__dict__[key] for key in ("facts", "history") if key in opened.__dict__})
    return found


def listed(patterns: str | Sequence[str]) -> list[str]:
    """Patterns as a list; a string is a single pattern."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _open_model(
    request: Request, streamed: bool, room: Callable[[Path], int]
) -> tuple[Path | None, PreTrainedModel, Resources]:
    """Check the output, then load the model (unless it is in memory), one block at a time if `streamed`."""
    output = None if request.output is None else Path(request.output).expanduser().resolve()
    resources = Resources(spill_gib=request.spill_gib)
    if isinstance(request.model, PreTrainedModel):
        if request.resume:
            raise BillhookError("Only a run on a model directory can be resumed, and this model is in memory.")
        if output is not None:
            check_output(output, overwrite=request.overwrite)
            choose_sink(request.model, None)
        reach(request.model, listed(request.targets))
        return None, request.model, resources
    if not isinstance(request.model, str | Path):
        kind = type(request.model).__name__
        raise BillhookError(f"The model must be a directory, a hub name or a transformers PreTrainedModel, got {kind}.")
    source = resolve(request.model, output)
    task = task_of_config(source, check_directory(source))
    if output is not None:
        unfinished = unfinished_run(output, resume=request.resume, overwrite=request.overwrite)
        check_output(output, source, overwrite=request.overwrite, needed=0 if unfinished else room(source))
    if streamed:
        stream = open_streamed(source, task.auto_class, **_loading(request), targets=listed(request.targets))
        if output is None or SameLayout(stream.model, source).mismatch() is None:
            return source, stream.model, replace(resources, stream=stream)
    model = load(source, task.auto_class, **_loading(request))
    reach(model, listed(request.targets))
    return source, model, resources


def in_memory(opened: Opened, request: Request) -> Opened:
    """The same with the whole model in memory, for what tries plans on it."""
    if not opened.resources.streamed or opened.source is None:
        return opened
    model = load(opened.source, opened.task.auto_class, **_loading(request))
    layers = same_layers(model, opened)
    return changed(opened, model=model, layers=layers, resources=replace(opened.resources, stream=None))


def same_layers(model: PreTrainedModel, opened: Opened) -> list[Layer]:
    """The layers of a second model that have the names of the opened one's; it gets the same added stacks."""
    add_stacks(model, added_stacks(opened.model))
    names = {layer.name for layer in opened.layers}
    return [layer for layer in find_layers(model, convolutions=True) if layer.name in names]


def _check_weights(model: PreTrainedModel, resources: Resources) -> None:
    """Raise BillhookError naming a parameter or persistent buffer of the model that is not finite."""
    check_finite(model)
    if resources.streamed:  # until then only what lies outside the blocks is in memory
        for index, (name, block) in enumerate(blocks_of(model).items()):
            with resources.block(index, ahead=index + 1):
                check_finite(block, f"{name}.")


def _loading(request: Request) -> dict[str, Any]:
    return {key: getattr(request, key) for key in ("dtype", "device", "trust_remote_code")}


def _draw(
    request: Request, source: Path | None, model: PreTrainedModel, task: Task, streamed: bool, progress: Progress
) -> Samples:
    """The calibration samples of a request; for a resumed run, the stored text that the model generated."""
    given: Any = request.calibration
    stored = None if request.output is None else partial_folder(Path(request.output).expanduser().resolve()) / WRITTEN
    if request.resume and stored is not None and stored.is_file() and is_self(given):
        given = saved_windows(stored)
    # a streamed model would read every block for every token
    elif streamed and source is not None and is_self(given):
        model = load(source, task.auto_class, **_loading(request))
    home = Home(source, request.trust_remote_code, request.skip_unreadable)
    return task.samples(given, model, home, request.drawing, progress)


def calibration_facts(opened: Opened) -> dict[str, Any]:
    """What identifies the calibration samples, in tables and billhook.json."""
    assert opened.samples is not None
    return opened.samples.facts(opened.model) | {"batch_size": rows_of(opened.batches[0])}
