"""What a training run works with: windows that are trained on and held out, the trained entries, time and memory."""

import functools
import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from billhook.architectures.config import context_length
from billhook.architectures.layers import Layer
from billhook.architectures.selection import select_layers
from billhook.architectures.stacks import blocks_of, find_stacks
from billhook.distributed.collectives import gather, world
from billhook.distributed.shards import local
from billhook.engine.batch import Batch, row_length, select_rows
from billhook.errors import BillhookError, JobError
from billhook.recovery.adapters import RATES, factors
from billhook.recovery.blockwise import tunable
from billhook.recovery.masked_adam import MaskedAdam
from billhook.recovery.objectives import OBJECTIVES
from billhook.recovery.outputs import predictor
from billhook.recovery.sharding import kept_shards, sharded
from billhook.recovery.trained import Kept, Trained, give_, values_of
from billhook.recovery.training import TrainingSetup, held_out_loss, steps_
from billhook.steps.recover_job import TOKENS, RecoverRequest
from billhook.steps.recover_source import Source
from billhook.steps.request import Opened, listed
from billhook.store.compute import chosen_device, free_gib, stored_dtype, stored_dtypes
from billhook.store.record import Record
from billhook.store.shards import weight_bytes
from billhook.tasks.base import Drawing, Home, Progress, Samples
from billhook.tasks.self_text import is_self, write_windows

LENGTH = 512  # tokens in a window by default
TOKENS_A_STEP = 512
TOGETHER = 2048  # tokens that go through the models at a time
WARM = 5  # steps in which published recipes reach their rate
BUDGETED = 4096  # windows that are drawn where the number of tokens follows from a time
IMAGES = 512  # that are drawn, where there are as many
HELD_OUT = 4, 16  # the least and the most windows in each of the two held-out parts
_TIMED = 3  # steps, to turn a time into a number of tokens


class Windows(NamedTuple):
    """The samples: those that are trained on with the ones on which the result is reported as `heldout`; those on which
    rates and states are chosen; and the rows of a step."""

    samples: Samples
    chosen_on: Batch
    rows: int


def draw_windows(
    request: RecoverRequest, opened: Opened, teacher: PreTrainedModel | None, progress: Progress
) -> Windows:
    """Draw the windows, or images, of a request; the `teacher` writes those of `self:`.

    Raises BillhookError for a text that is too short to train on and to hold out windows.
    """
    tokens, length, answers = request.tokens, request.length, opened.task.unit == "answer"  # rows have their lengths
    of_text = opened.model.main_input_name == "input_ids" and not answers
    if of_text and (length is None or request.recipe):  # a recipe's length is one for longer contexts
        length = length or LENGTH
        length = min(length, context_length(opened.model.config) or length)
    most = IMAGES
    if of_text and length is not None:
        rows = request.batch_size or max(world(), TOKENS_A_STEP // length)
        budgeted = request.seconds is not None and not is_self(request.calibration)  # which writes all of them first
        most = BUDGETED if budgeted else rows * math.ceil((tokens or TOKENS) / (rows * length))
        most = request.windows or most
    drawing = Drawing(most + 2 * HELD_OUT[1], length, request.seed, "packed", request.bos, fewer=True)
    home = Home(opened.source, request.trust_remote_code, request.skip_unreadable)
    given: Any = request.calibration
    drawn = opened.task.samples(given, teacher or opened.model, home, drawing, progress)
    count, size = len(drawn), row_length(opened.model, drawn.batch)
    rows = _rows_of_step(request, size)
    held = min(HELD_OUT[1], max(HELD_OUT[0], count // 8))
    if count < 2 * held + rows:
        kind = f"windows of {size} tokens" if of_text else "questions" if answers else "images"
        smaller = " or ".join(["--length"] * of_text + ["--batch-size"] * bool(request.batch_size))
        raise BillhookError(
            f"{drawn.source} has only {count} {kind}: recovery holds out {2 * held} and trains on at least {rows}. "
            f"Give more{' text' if of_text else ''}{f', or a smaller {smaller}' if smaller else ''}."
        )
    parts = slice(0, count - 2 * held), slice(count - 2 * held, count - held), slice(count - held, None)
    own, chosen_on, reported = (select_rows(drawn.batch, part) for part in parts)
    return Windows(replace(drawn, batch=own, heldout=reported), chosen_on, rows)


def _rows_of_step(request: RecoverRequest, size: int) -> int:
    """Windows of `size` tokens in a step; raises BillhookError where the processes cannot share them."""
    rows = request.batch_size or max(world(), TOKENS_A_STEP // size)
    if rows < world():
        raise BillhookError(
            f"{world()} processes cannot share a step of {rows} windows: give a larger --batch-size, or start fewer."
        )
    if request.fsdp and request.batch_size is None:
        rows -= rows % world()
    if request.fsdp and rows % world():
        raise BillhookError(
            f"--fsdp gives every process as many windows: --batch-size {rows} is no multiple of {world()} processes."
        )
    return rows


def check_sharding(request: RecoverRequest, source: Source) -> None:
    """Raise BillhookError where the model is to be sharded and cannot be."""
    if not request.fsdp:
        return
    if world() == 1:
        start = "torchrun --nproc-per-node N -m billhook recover"
        raise BillhookError(f"--fsdp shards the model over the processes of torchrun, and there is one: use {start}.")
    if source.grids:
        raise BillhookError(f"{source.given} is quantized, and scales are not sharded: leave out --fsdp.")
    if request.tune == "adapters":
        raise BillhookError("Adapters are not sharded: use --fsdp with --tune kept+norms or kept.")


def trained(opened: Opened, source: Source, request: RecoverRequest) -> list[Trained]:
    """What is trained: the factors of adapters, or weights of prunable layers that are not zero, or the scales of
    quantized ones, and with norms all parameters of one dimension."""
    if request.tune == "adapters":
        if source.grids and request.save == "merged":
            raise BillhookError(
                f"Adapters cannot be merged into {source.given}, which is quantized: use --save adapter."
            )
        return list(factors(opened.model))
    names = {id(p): name for name, p in opened.model.named_parameters()}
    layers = trained_layers(opened, request)
    of_weights = [] if source.grids else layers
    tuned = [(names[id(p)], p, mask) for p, mask in tunable(opened.model, of_weights, request.tune == "kept+norms")]
    own, stored = _own_parts(opened), {} if opened.source is None else stored_dtypes(opened.source)
    kept = [
        Kept(name, p, stored.get(name, stored_in(opened)), mask)
        for name, p, mask in tuned
        if p.ndim > 1 or name.startswith(own)
    ]
    return [*source.scales(opened, {layer.stored_name for layer in layers}), *kept]


def _own_parts(opened: Opened) -> tuple[str, ...]:
    """The beginnings of the names of parameters that belong to the chosen stacks of blocks, such as a decoder with its
    last norm; of all names where all stacks are chosen."""
    stacks = find_stacks(opened.model)
    chosen = [stack.name for stack in stacks if any(x.name.startswith(f"{stack.name}.") for x in opened.layers)]
    return ("",) if len(chosen) == len(stacks) else tuple(f"{name.rpartition('.')[0]}." for name in chosen)


def trained_layers(opened: Opened, request: RecoverRequest) -> list[Layer]:
    """The layers that a request names, all by default."""
    targets, ignore, also = listed(request.targets), listed(request.ignore), {x.name for x in opened.layers}
    return select_layers(opened.model, opened.layers, targets, ignore, also=also)


def matched_blocks(history: Record | None, student: int, teacher: int) -> list[int] | None:
    """For each of the student's blocks the block of the teacher whose output it is compared with: the last one before
    what the student's next block was. None where the history does not lead from `teacher` to `student` blocks."""
    order = list(range(teacher))
    for step in () if history is None else history.steps:
        gone = set(step.made_by.get("dropped") or ())
        order = [block for index, block in enumerate(order) if index not in gone]
    if len(order) != student:
        return None
    return [block - 1 for block in order[1:]] + [teacher - 1]


def make_setup(
    request: RecoverRequest, opened: Opened, source: Source, teacher: PreTrainedModel | None, windows: Windows
) -> TrainingSetup:
    """The setup of a request, with one step; its objective is configured and fits both models."""
    name = request.objective
    options = OBJECTIVES.configure(name, request.options)
    needs, model, task = OBJECTIVES.needs(name, options), opened.model, opened.task
    count = len(blocks_of(model))
    matched = None if teacher is None else matched_blocks(opened.history, count, len(blocks_of(teacher)))
    if "hidden" in needs and matched is None:
        raise BillhookError(
            f"The blocks of {request.model} cannot be matched with those of its dense model: use --objective kl."
        )
    written = "written" in needs
    if written and task.name != "text-generation":
        raise BillhookError(f"The objective {name} is for models that write text: use --objective kl.")
    inside = "hidden" in needs
    length = row_length(model, windows.samples.batch)
    prefix, kept = windows.samples.prefix, trained(opened, source, request)
    if request.fsdp:
        device = chosen_device(request.device)
        model, teacher = sharded(model, device), None if teacher is None else sharded(teacher, device)
        kept = [*kept_shards([k for k in kept if isinstance(k, Kept)], model)]
    write = (lambda number, seed: write_windows(model, number, length, seed=seed, prefix=prefix)) if written else None
    setup = TrainingSetup(
        model=model, trained=kept, batch=windows.samples.batch, rows=windows.rows, steps=1,
        objective=functools.partial(OBJECTIVES.get(name), **options),
        student=predictor(model, task, range(count) if inside else None),
        teacher=None if teacher is None else predictor(teacher, task, matched if inside else None, gradients=False),
        held_out=held_out_loss(model, teacher if "teacher" in needs else None, windows.chosen_on, task),
        write=write, seed=request.seed, warm=WARM if request.recipe else None, together=max(1, TOGETHER // length),
    )  # fmt: skip
    return replace(setup, shares=RATES) if request.tune == "adapters" else setup


def stored_in(opened: Opened) -> torch.dtype:
    """The dtype of most weights in the files of the model."""
    found = None if opened.source is None else stored_dtype(opened.source)
    return found or opened.model.dtype


def steps_in(setup: TrainingSetup, seconds: float, racing: bool) -> int:
    """The number of steps, with races and measurements, that fit in a time, from the time of a few steps."""
    start, begun = values_of(setup.trained), time.perf_counter()
    setup.held_out()
    measuring = time.perf_counter() - begun
    adam, times = MaskedAdam(setup.trained), [time.perf_counter()]
    for _ in steps_(replace(setup, steps=_TIMED), adam, min(setup.shares)):
        times.append(time.perf_counter())
    adam.close()
    give_(setup.trained, start)
    step, steps = min(after - before for before, after in pairwise(times)), 1
    for power in range(30, -1, -1):  # the largest number, digit by digit
        more = steps + 2**power
        whole = replace(setup, steps=more)
        races = len(setup.shares) * (whole.race_steps * step + measuring) if racing else 0.0
        if races + more * step + (more / whole.measured_every + 2) * measuring <= seconds:
            steps = more
    return steps


def state_bytes(setup: TrainingSetup) -> int:
    """The most bytes of the files with the state of a run: weights, two moments, and the best weights."""
    count = sum(k.count for k in setup.trained)
    return 16 * (sum(gather(count)) if setup.sharded else count)


def teacher_fits(path: Path, opened: Opened) -> bool:
    """Whether the dense model of a directory fits in memory beside the opened one and its optimizer."""
    free, stored = free_gib(str(opened.model.device)), stored_dtype(path)
    if free is None or stored is None:
        return True
    kept = sum(int(torch.count_nonzero(layer.weight)) for layer in opened.layers)
    teacher = weight_bytes(path) / stored.itemsize * opened.model.dtype.itemsize
    return bool(teacher + 28 * kept <= free * 2**30)


def check_memory(setup: TrainingSetup, teacher: PreTrainedModel | None) -> str:
    """A sentence about the memory of the run; raises JobError where it is not there.

    Beside the models: the positions of the trained numbers, for each of them 16 bytes of the optimizer and its values
    before and at best, and the largest gradient. Where there are adapters, autograd keeps the merged weights and their
    masks.
    """
    largest, kept = max(local(k.parameter).numel() for k in setup.trained), sum(k.count for k in setup.trained)
    itemsize = setup.model.dtype.itemsize
    states = sum(k.held for k in setup.trained) + 24 * kept + itemsize * largest
    adapted = sum(p.numel() for name, p in setup.model.named_parameters() if name.endswith(".base_layer.weight"))
    states += (itemsize + 1) * adapted
    both = [p for m in (setup.model, teacher) if m is not None for p in m.parameters()]
    models = itemsize * sum(p.numel() for p in both if not p.is_meta) // (world() if setup.sharded else 1)
    free = free_gib(str(setup.model.device))
    if free is not None and states / 2**30 > free:
        raise JobError(
            f"Training {kept:,} numbers needs {states / 2**30:.2f} GiB beside the models, and {free:.2f} GiB are free: "
            "free some, or use --dtype bfloat16."
        )
    parts = f"{(states + models) / 2**30:.2f} GiB of memory beside activations, {models / 2**30:.2f} of them for models"
    read = " The dense model does not fit beside that: it is read one block at a time, in every step."
    return f"Training {kept:,} numbers takes {parts}.{read if any(p.is_meta for p in both) else ''}"
