"""`billhook unpack`: restore the dense directory from which a packed one was made, byte for byte."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import emit, progress, say
from billhook.cli.options import Json, output_option

NAME = "unpack"
EXAMPLES = """\b
Examples:
  billhook unpack ./packed -o ./dense
"""


def command(
    directory: Annotated[Path, typer.Argument(help="A directory that billhook pack wrote.")],
    *,
    output: Annotated[Path, output_option("Directory of the dense model; new or empty.")],
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
