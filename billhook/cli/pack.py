"""`billhook pack`: make a smaller directory from a sparse one, for `billhook.load`, `billhook generate` and `billhook
bench`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from billhook.cli.common import emit, progress, say, say_notes, table
from billhook.cli.options import Json, output_option

NAME = "pack"
EXAMPLES = """\b
Examples:
  billhook pack ./pruned -o ./packed
  billhook pack ./pruned -o ./packed --values int8 --group 128
  billhook generate ./packed "Once upon a time"
"""
VALUES_HELP = "stored keeps every byte; int8 rounds the kept weights and reports the error."
GROUP_HELP = "Columns that share an int8 scale: 64, 128, 256, ...; by default a whole row."


def command(
    model: Annotated[str, typer.Argument(help="Model directory with zeros, from any tool, or a name on the hub.")],
    *,
    output: Annotated[Path, output_option("Directory of the packed model; new or empty.")],
    values: Annotated[Literal["stored", "int8"], typer.Option(help=VALUES_HELP)] = "stored",
    group: Annotated[int | None, typer.Option(help=GROUP_HELP, metavar="N")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Store each sparse weight as a bitmask and its non-zero values."""
    from billhook.steps.pack import pack

    with progress("counting and packing tensors") as advance:
        report = pack(model, output, values=values, group=group, overwrite=overwrite, progress=advance)
    say_notes(report.notes)
    if values == "int8" and not as_json:
        rows = [[name, f"{facts['error']:.3%}"] for name, facts in report.layers.items()]
        table("Error of int8, |W' - W| / |W|", ["tensor", "error"], rows)
    packed, dense = report.packed_bytes, report.dense_bytes
    sizes = f"{packed / 2**20:,.1f} MiB of weights, {packed / dense:.1%} of the dense {dense / 2**20:,.1f} MiB"
    say(f"{report.output}: {sizes}.")
    error = "lossless" if values == "stored" else f"int8 changes the packed weights by {report.error:.3%} in total"
    say(f"{len(report.layers)} tensors packed at {report.sparsity:.2%} sparsity; {report.dense} left dense; {error}.")
    say(_use(report.output))
    say(f"Undo it: billhook unpack {report.output} -o DENSE")
    if as_json:
        emit(report.to_json())


def _use(output: Path) -> str:
    """What to do with a packed model, by its task."""
    from billhook.errors import BillhookError
    from billhook.store.checkpoint import read_config
    from billhook.tasks.opening import task_of_config

    try:
        task = task_of_config(output, read_config(output)).name
    except BillhookError:
        task = ""  # packing needs no task
    if task == "text-generation":
        return f'Run it: billhook generate {output} "Once upon a time"'
    if task == "image-text-to-text":
        return f'Run it: billhook generate {output} "What is this?" --image IMAGE'
    return f"Score it: billhook eval {output} --data SOURCE"
