"""Open the model and the calibration text that a request names."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from billhook import __version__ as VERSION
from billhook.ambient import check_model
from billhook.architectures.layers import Layer, check_finite, find_layers
from billhook.architectures.selection import reach, select_layers
from billhook.architectures.sources import resolve
from billhook.architectures.stacks import add_stacks, added_stacks, blocks_in, blocks_of
from billhook.distributed.collectives import rows_per_batch, world
from billhook.engine.batch import Batch, row_length, rows_of, split_rows
from billhook.engine.dead_blocks import dead_blocks
from billhook.engine.resources import Resources
from billhook.engine.streaming import open_streamed
from billhook.errors import BillhookError
from billhook.plan.plan import Plan
from billhook.steps.batch_size import batch_size
from billhook.steps.facts import computed_in, model_facts
from billhook.steps.inputs import Inputs, ModelRequest, listed
from billhook.steps.state import partial_folder, unfinished_run
from billhook.store.checkpoint import check_directory, load
from billhook.store.layout import WRITTEN
from billhook.store.output import absolute, check_output
from billhook.store.record import Record, history
from billhook.store.shards import weight_bytes
from billhook.store.sinks import SameLayout, choose_sink
from billhook.tasks.base import Home, Progress, Samples, Task
from billhook.tasks.opening import task_of, task_of_config
from billhook.tasks.self_text import PREFIX, is_self, saved_windows
from billhook.text.given import Given


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
    request: ModelRequest, needs_text: bool, who: str, *, streamed: bool = False, progress: Progress = lambda step: None
) -> Opened:
    """Load the model, select its layers, and draw the calibration samples if `needs_text`; cheapest checks first.

    With `streamed`, a model directory is opened with one block at a time in memory. Raises BillhookError for an
    impossible request; `who` needs the samples in its message.
    """
    check_text_given(request, needs_text, who)
    opened = open_model(request, streamed=streamed)
    return _without_dead_blocks(draw_text(opened, request, progress)) if needs_text else opened


def check_text_given(request: Inputs, needed: bool, who: str) -> None:
    """Raise BillhookError where text is `needed`, by `who`, and the request names none, or an empty name."""
    if isinstance(request.calibration, str) and not request.calibration.strip():
        raise BillhookError("The name that --calibration gives is empty: is a variable of the shell unset?")
    if needed and request.calibration is None:
        raise BillhookError(
            f"{who} needs activations: give text with --calibration FILE.txt, FILE.jsonl, TOKENS.safetensors or hub:c4 "
            "(images for an image model). With --calibration self: the model writes it; real text is better."
        )


def open_model(
    request: ModelRequest, *, streamed: bool, room: Callable[[Path], int] = weight_bytes, also: Collection[str] = ()
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


def draw_text(opened: Opened, request: ModelRequest, progress: Progress = lambda step: None) -> Opened:
    """The same with the calibration samples of the request."""
    samples = _draw(request, opened, progress)
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


def check_stays(given: Given | None, output: Path) -> None:
    """Raise BillhookError for a file or folder that is read and is in a directory that the output would replace."""
    name = str(given).removeprefix(PREFIX).removeprefix("hub:") if isinstance(given, str | Path) else ""
    path = Path(name).expanduser()
    if output.is_dir() and name and os.path.exists(path) and path.resolve().is_relative_to(output):
        raise BillhookError(f"{path} is read, and is in {output}, which would be replaced: choose another output.")


def _open_model(
    request: ModelRequest, streamed: bool, room: Callable[[Path], int]
) -> tuple[Path | None, PreTrainedModel, Resources]:
    """Check the output, then load the model (unless it is in memory), one block at a time if `streamed`."""
    output = None if request.output is None else absolute(request.output)
    if output is not None:
        check_stays(request.calibration, output)
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
        stream = open_streamed(source, task.auto_class, **request.loading, targets=listed(request.targets))
        if output is None or SameLayout(stream.model, source).mismatch() is None:
            return source, stream.model, replace(resources, stream=stream)
    model = load(source, task.auto_class, **request.loading)
    reach(model, listed(request.targets))
    return source, model, resources


def in_memory(opened: Opened, request: ModelRequest) -> Opened:
    """The same with the whole model in memory, with the same layers and added stacks, for what tries plans on it."""
    if not opened.resources.streamed or opened.source is None:
        return opened
    model = load(opened.source, opened.task.auto_class, **request.loading)
    add_stacks(model, added_stacks(opened.model))
    names = {layer.name for layer in opened.layers}
    layers = [layer for layer in find_layers(model, convolutions=True) if layer.name in names]
    return changed(opened, model=model, layers=layers, resources=replace(opened.resources, stream=None))


def _check_weights(model: PreTrainedModel, resources: Resources) -> None:
    """Raise BillhookError naming a parameter or persistent buffer of the model that is not finite."""
    check_finite(model)
    if resources.streamed:  # until then only what lies outside the blocks is in memory
        for index, (name, block) in enumerate(blocks_of(model).items()):
            with resources.block(index, ahead=index + 1):
                check_finite(block, f"{name}.")


def _draw(request: ModelRequest, opened: Opened, progress: Progress) -> Samples:
    """The calibration samples of a request; for a resumed run, the stored text that the model generated."""
    given: Any = request.calibration
    source, model = opened.source, opened.model
    stored = None if request.output is None else partial_folder(absolute(request.output)) / WRITTEN
    if request.resume and stored is not None and stored.is_file() and is_self(given):
        given = saved_windows(stored)
    # a streamed model would read every block for every token
    elif opened.resources.streamed and source is not None and is_self(given):
        model = load(source, opened.task.auto_class, **request.loading)
    home = Home(source, request.trust_remote_code, request.skip_unreadable)
    return opened.task.samples(given, model, home, request.drawing, progress)


def calibration_facts(opened: Opened) -> dict[str, Any] | None:
    """What identifies the calibration samples, in tables and billhook.json; None without samples."""
    if opened.samples is None:
        return None
    return opened.samples.facts(opened.model) | {"batch_size": rows_of(opened.batches[0])}


def identity(
    request: ModelRequest, opened: Opened, options: Mapping[str, Any], plan: Plan | None, **own: Any
) -> dict[str, Any]:
    """What must be the same for a run to be resumed: versions, model, data and everything that changes the result.

    `options` are those of all methods, `plan` is the given one, and what a command has beside these is its `own`.
    """
    return {
        "version": f"{VERSION}, torch {torch.__version__}, transformers {transformers.__version__}",
        "processes": world(),
        "model": opened.facts["digest"],
        "history": None if opened.history is None else digest_of_json(opened.history.to_json()),
        "published": request.published,
        "seed": request.seed,
        **own,
        **computed_in(opened.model),
        **request.selection,
        "options": dict(options),
        "plan": None if plan is None else digest_of_json(plan.to_json()),
        "calibration": calibration_facts(opened),
    }


def digest_of_json(value: Mapping[str, Any]) -> str:
    """The SHA-256 of a value as json."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
