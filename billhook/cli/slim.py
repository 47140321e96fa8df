"""`billhook slim`: a model directory in, a directory with fewer channels, heads, experts or blocks out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from billhook.cli import options as shared
from billhook.cli.common import (
    duration,
    emit,
    graceful_interrupt,
    parse_settings,
    progress,
    say,
    say_next,
    say_notes,
    split_list,
)

if TYPE_CHECKING:
    from billhook.steps.slim_job import SlimReport

NAME = "slim"
EXAMPLES = """\b
Examples:
  billhook slim model --remove 0.25 --calibration text.txt -o small
  billhook slim model --remove 0.2 --units channels --calibration hub:c4 -o smaller
  billhook slim model --remove 0.2 --units channels --allocator auto --calibration hub:c4 -o narrower
  billhook slim model --plan small/shape.json --calibration text.txt -o again
"""
PLAN_HELP = "The numbers of parts that stay, such as the shape.json of an earlier run, instead of a fraction."
STACKS = "Only units of these stacks of blocks: language, vision, all (the default), or a module's name. Repeatable."


@dataclass(frozen=True)
class Method:
    """What is removed, and how it is chosen."""

    remove: Annotated[
        float | None,
        typer.Option(
            parser=shared.fraction, metavar="FRACTION", help="Of the parameters in blocks to remove: 0.25 or 25%."
        ),
    ] = None
    units: Annotated[
        str,
        typer.Option(
            help="Kinds that may go, of channels, heads, experts, blocks; auto tries which of them lose least."
        ),
    ] = "auto"
    allocator: Annotated[
        str,
        typer.Option(
            help="How much each unit loses: uniform, auto (measured and tried on text), rco (by gradients), or one of "
            "billhook ls allocators. By default uniform; with --units auto, auto.",
            metavar="NAME",
        ),
    ] = ""
    shape: Annotated[
        str,
        typer.Option(
            help="uniform: all blocks alike, and the allocator decides only between kinds; per-layer: blocks differ. "
            "By default per-layer where an allocator is given.",
            metavar="SHAPE",
        ),
    ] = ""
    experts: Annotated[str, typer.Option(help="How experts are chosen: obs, merge, reap or frequency.")] = "obs"
    drop_by: Annotated[
        str, typer.Option(help="How blocks are chosen: kl (predictions on text) or angular (hidden states).")
    ] = "kl"
    plan: Annotated[Path | None, typer.Option(help=PLAN_HELP)] = None
    method: Annotated[str, typer.Option(help="How parts are chosen: see billhook ls structured.")] = "obs"
    settings: shared.Settings = None


def command(
    model: shared.Model,
    *,
    output: Annotated[Path, shared.output_option("Directory of the smaller model; must be new or empty.")],
    method: Method,
    text: shared.Text,
    work: shared.Loading,
    stacks: Annotated[list[str] | None, typer.Option(help=STACKS, metavar="NAME")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per forward pass; by default by size.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    writing: shared.Writing,
    as_json: shared.Json = False,
) -> None:
    """Remove whole units: a smaller model that every program runs as it is, and runs faster."""
    from billhook.distributed.collectives import distributed
    from billhook.steps.slim import SlimRequest, prepare, run
    from billhook.steps.slim_estimate import announced_time
    from billhook.steps.state import finished_items

    chosen: dict[str, Any] = {"units": split_list(method.units), "plan": method.plan, "method": method.method}
    chosen |= {"allocator": method.allocator, "shape": method.shape, "stacks": stacks or ()}
    chosen |= {"experts": method.experts, "drop_by": method.drop_by}
    chosen |= {"options": parse_settings(method.settings), "batch_size": batch_size, "seed": seed}
    groups: dict[str, Any] = {**chosen, **vars(text), **work.fields(model), **vars(writing)}
    request = SlimRequest(model, output, method.remove, **groups)
    with distributed(request.device):
        with progress("reading") as advance:
            job = prepare(request, advance)
        say_notes(job.notes)
        if (seconds := announced_time(job)) is not None:
            say(f"Removing and scoring takes about {duration(seconds)}, as the first block did.")
        unit, done = max(1, len(job.units) // len(job.smaller.blocks)), finished_items(output, writing.resume)
        bar = progress("removing", job.steps, unit=unit, skipped=done)
        with bar as advance, graceful_interrupt() as stopping:
            report = run(job, advance, stopping)
    say_notes(report.warnings[len(job.notes) :])
    sizes = f"{report.size / 1e6:.1f} MB of weights, {report.source_size / 1e6:.1f} MB before"
    padding = f", {report.padding:.1%} stored as zeros" if report.padding else ""
    gone = f"{report.removed:.1%} of the parameters in blocks removed{padding}"
    say(f"{report.output}: {gone}; {sizes}. {report.seconds:.1f} s.")
    say(f"{_what_stayed(report) or 'Every unit stays whole'}.")
    if report.loss is not None:
        say(f"{report.loss}.")
    say_next(report.output)
    if as_json:
        emit(report.to_json())


def _what_stayed(report: "SlimReport") -> str:
    """How many parts stayed of the kinds of which some went, and which blocks were dropped."""
    kinds: dict[str, list[str]] = {}
    for name in report.kept:
        kinds.setdefault(name.rpartition(":")[2].replace("heads", "key/value heads"), []).append(name)
    found = []
    for kind, names in kinds.items():
        kept, of = [len(report.kept[name]) for name in names], [report.counts[name] for name in names]
        if kept != of:
            found.append(f"{_range(kept)} of {_range(of)} {kind} stay")
    found += [f"dropped: {', '.join(f'block {i}' for i in report.dropped)}"] if report.dropped else []
    return "; ".join(found)


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
