"""`billhook report`: make a directory's report, model card and page again."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import Json, emit, guarded, say

NAME = "report"
EXAMPLES = """\b
Examples:
  billhook report ./pruned
  billhook report ./pruned --speed bench.json
"""


@guarded
def command(
    directory: Annotated[Path, typer.Argument(help="A pruned directory.", metavar="DIR")],
    speed: Annotated[
        Path | None, typer.Option(help="What a benchmark found, such as the output of billhook bench --json.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make report.json, the model card README.md and report.html of a pruned directory again."""
    from billhook.errors import BillhookError
    from billhook.files import read_json
    from billhook.publishing import publish

    if not directory.is_dir():
        raise BillhookError(f"There is no directory {directory}.")
    report = publish(directory, None if speed is None else {"speed": read_json(speed, "benchmark result")})
    say(f"{directory}: report.json, README.md and report.html, with {len(report['evaluations'])} evaluations.")
    if as_json:
        emit(report)
