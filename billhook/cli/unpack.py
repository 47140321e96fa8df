"""`billhook unpack`: restore the dense directory that a packed one was made from, byte for byte."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import Json, emit, handle_errors, progress, say

NAME = "unpack"
EXAMPLES = """\b
Examples:
  billhook unpack ./packed -o ./dense
"""


@handle_errors
def command(
    directory: Annotated[Path, typer.Argument(help="A directory that billhook pack wrote.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the dense model; new or empty.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write an ordinary Hugging Face directory that any program can open."""
    from billhook.steps.pack import unpack

    with progress("unpacking files") as advance:
        path = unpack(directory, output, overwrite=overwrite, progress=advance)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    say(f"{path}: {size / 2**20:,.1f} MiB.")
    if as_json:
        emit({"output": str(path), "bytes": size})
