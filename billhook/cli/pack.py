"""`billhook pack`: a smaller directory from one with zeros, for `billhook.load`, `billhook generate` and `billhook
bench`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from billhook.cli.common import Json, emit, handle_errors, progress, say, table

NAME = "pack"
EXAMPLES = """\b
Examples:
  billhook pack ./pruned -o ./packed
  billhook pack ./pruned -o ./packed --values int8 --group 128
  billhook generate ./packed "Once upon a time"
"""


@handle_errors
def command(
    model: Annotated[str, typer.Argument(help="Model directory with zeros, whoever made them, or a name on the hub.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the packed model goes; must be new or empty.")],
    values: Annotated[
        Literal["stored", "int8"],
        typer.Option(help="stored keeps every byte; int8 rounds the weights left over, and says how much."),
    ] = "stored",
    group: Annotated[
        int | None,
        typer.Option(help="Columns that share an int8 scale: 64, 128, 256, ...; by default a whole row.", metavar="N"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Store each sparse weight as a bitmask and its non-zero values."""
    from billhook.packed.packing import pack

    with progress("counting and packing tensors") as advance:
        report = pack(model, output, values=values, group=group, overwrite=overwrite, progress=advance)
    for note in report.notes:
        say(f"note: {note}")
    if values == "int8" and not as_json:
        table(
            "What int8 changes, |W' - W| / |W|",
            ["tensor", "error"],
            [[x, f"{facts['error']:.3%}"] for x, facts in report.layers.items()],
        )
    size, share = report.packed_bytes / 2**20, report.packed_bytes / report.dense_bytes
    say(f"{report.output}: {size:,.1f} MiB of weights, {share:.1%} of the dense {report.dense_bytes / 2**20:,.1f} MiB.")
    lossless = (
        "every byte can be had back"
        if values == "stored"
        else f"int8 changes the packed weights by {report.error:.3%} in all"
    )
    say(
        f"{len(report.layers)} tensors packed, {report.sparsity:.2%} of their weights removed; {report.dense} "
        f"left dense; {lossless}."
    )
    say(
        f'Run it: billhook generate {report.output} "Once upon a time"   '
        f"Undo it: billhook unpack {report.output} -o DENSE"
    )
    if as_json:
        emit(report.to_json())
