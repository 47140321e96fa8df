"""`billhook verify`: check a directory that billhook wrote, from the files on disk."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import Failure, emit, say
from billhook.cli.options import Json

NAME = "verify"
EXAMPLES = """\b
Examples:
  billhook verify ./pruned
  billhook verify ./pruned --source ./model
  billhook verify ./pruned --json
"""
SOURCE_HELP = "The model from which a step started: weights that no step updated must have its bytes."


def command(
    directory: Annotated[Path, typer.Argument(help="A directory that billhook wrote.")],
    *,
    source: Annotated[Path | None, typer.Option(help=SOURCE_HELP, metavar="MODEL")] = None,
    as_json: Json = False,
) -> None:
    """Compare zeros, N:M groups, checksums and the chain of steps with billhook.json; fails on any difference."""
    from billhook.steps.verify import verify

    result = verify(directory, source=source)
    for problem in result.problems:
        say(f"problem: {problem}")
    verdict = "verified" if result.ok else "NOT as recorded"
    steps = "1 step" if result.steps == 1 else f"{result.steps} steps"
    zeros = f"{result.layers} layers, {result.zeros:,} zeros of {result.weights:,} weights"
    say(f"{directory}: {verdict}, {steps}, {zeros}.")
    if as_json:
        emit(result.to_dict())
    if not result.ok:
        raise Failure(1)
