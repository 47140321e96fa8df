"""`billhook recover`: a pruned or slimmed model directory in, the same with what it has left trained out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from billhook.cli import options as shared
from billhook.cli.common import (
    emit,
    graceful_interrupt,
    layers_per_block,
    parse_settings,
    progress,
    say,
    say_next,
    say_notes,
)

if TYPE_CHECKING:
    from billhook.steps.recover_job import RecoverReport, RecoverRequest

NAME = "recover"
EXAMPLES = """\b
Examples:
  billhook recover pruned --calibration text.txt -o better
  billhook recover pruned --calibration hub:c4 --budget 30m -o better
  billhook recover pruned --calibration text.txt --tokens 1000000 --objective kl -o better
  billhook recover pruned --calibration text.txt --tune adapters --rank 16 --save adapter -o adapter
  billhook recover pruned --calibration hub:c4 --recipe alphapruning-lora -o better
"""


@dataclass(frozen=True)
class Training:
    """What is trained, for what, and how long."""

    calibration: shared.Calibration = None
    teacher: Annotated[
        Path | None, typer.Option(help="The dense model's directory, where the history does not lead to it.")
    ] = None
    recipe: Annotated[
        str, typer.Option(help="A published way, which fills in what is not given: alphapruning-lora, atp-lora.")
    ] = ""
    objective: Annotated[
        str, typer.Option(help="What is trained for: see billhook ls objectives.  [default: kl+hidden]", metavar="NAME")
    ] = ""
    tune: Annotated[
        str,
        typer.Option(
            help="kept+norms: the weights that are not zero, norms and biases; kept: the weights alone; adapters: LoRA "
            "on all linear layers.  [default: kept+norms]"
        ),
    ] = ""
    rank: Annotated[int | None, typer.Option(help="Rank of adapters.  [default: 8]", min=1, show_default=False)] = None
    save: Annotated[
        str, typer.Option(help="Adapters are merged, or the output is an adapter.", metavar="merged|adapter")
    ] = "merged"
    by: Annotated[
        str,
        typer.Option(help="The whole model, or one block at a time, which needs little memory.", metavar="model|block"),
    ] = "model"
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing: less memory for activations, more time.")
    ] = False
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Shard the model and its teacher over the processes of torchrun (FSDP2).")
    ] = False
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of text to train on.  [default: 102400]", min=1, show_default=False)
    ] = None
    budget: Annotated[str | None, typer.Option(help="A time instead of tokens: 90s, 10m, 2h.", metavar="TIME")] = None
    rate: Annotated[
        float | None,
        typer.Option(
            help="Rate, as a share of each parameter's root mean square (adapters: of 1); by default several race."
        ),
    ] = None
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window; by default 512, or the model's context.", min=2)
    ] = None
    bos: shared.Bos = "auto"
    skip_unreadable: shared.SkipUnreadable = False
    settings: shared.Settings = None


def command(
    model: shared.Model,
    *,
    output: Annotated[Path, shared.output_option("Directory of the trained model; must be new or empty.")],
    training: Training,
    work: shared.Choosing,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a step; by default 512 tokens.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    writing: shared.Writing,
    as_json: shared.Json = False,
) -> None:
    """Train what a pruned or slimmed model has left, with the dense model as its teacher; zeros stay zeros."""
    from billhook.distributed.collectives import distributed
    from billhook.steps.recover import RecoverRequest, prepare, run

    chosen = {key: value for key, value in vars(training).items() if key != "settings"}
    chosen |= {"options": parse_settings(training.settings), "batch_size": batch_size, "seed": seed}
    groups: dict[str, Any] = {**chosen, **work.fields(model, streams=False), **vars(writing)}
    request = RecoverRequest(model=model, output=output, **groups)
    if request.by == "block":
        return _by_block(request, as_json)
    with distributed(request.device):
        with progress("reading") as advance:
            job = prepare(request, advance)
        say_notes(job.notes)
        with progress("training", job.steps) as advance, graceful_interrupt("measurement") as stopping:
            report = run(job, advance, stopping)
    say_notes(report.warnings[len(job.notes) :])
    _show(report, request)
    if as_json:
        emit(report.to_json())


def _show(report: "RecoverReport", request: "RecoverRequest") -> None:
    """Say what became better, and what to do next."""
    if report.improved:
        held_out = f"held-out loss {report.before:.4f} -> {report.after:.4f} at step {report.state.best}"
        size = "" if request.tune == "adapters" else " of each parameter's size"
        say(f"{report.output}: {held_out}, {report.tokens:,} tokens, rate {report.rate:g}{size}.")
    say(f"{report.zeros:,} zeros, all in their place. {report.seconds:.1f} s.")
    if report.lost_before is not None:
        say(f"Before: {report.lost_before}.")
    if report.loss is not None:
        say(f"Now: {report.loss}.")
    if request.save == "merged":
        say_next(report.output)


def _by_block(request: "RecoverRequest", as_json: bool) -> None:
    from billhook.steps.recover_blocks import prepare_blocks, run_blocks
    from billhook.steps.state import finished_items

    with progress("reading") as advance:
        job = prepare_blocks(request, advance)
    layers = job.dense.layers
    done = finished_items(request.output, request.resume)
    bar = progress("tuning", len(layers), unit=layers_per_block(layers), skipped=done)
    with bar as advance, graceful_interrupt() as stopping:
        report = run_blocks(job, advance, stopping)
    say_notes(report.notes)
    say(f"{report.output}: {report.zeros:,} zeros, all in their place. {report.seconds:.1f} s.")
    for when, loss in (("Before", report.lost_before), ("Now", report.loss)):
        if loss is not None:
            say(f"{when}: {loss}.")
    if as_json:
        emit(report.to_json())
