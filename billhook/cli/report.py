"""`billhook report`: write the report, model card and page of a pruned directory again."""

from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.cli.common import emit, say
from billhook.cli.options import Json

NAME = "report"
EXAMPLES = """\b
Examples:
  billhook report ./pruned
  billhook report ./pruned --speed bench.json
  billhook report ./pruned --table table.json
"""
SPEED_HELP = "The result of a benchmark, such as the output of billhook bench --json."
TABLE_HELP = "A table.json of the dense model: adds its spectral metrics to the page."


def command(
    directory: Annotated[Path, typer.Argument(help="A pruned or quantized directory.", metavar="DIR")],
    *,
    speed: Annotated[Path | None, typer.Option(help=SPEED_HELP, metavar="FILE")] = None,
    table: Annotated[Path | None, typer.Option(help=TABLE_HELP, metavar="TABLE")] = None,
    as_json: Json = False,
) -> None:
    """Write report.json, the model card README.md and report.html of a pruned directory again.

    Of a quantized directory, only the card.
    """
    from billhook.errors import BillhookError
    from billhook.plan.densities import spectra_of
    from billhook.plan.table import Table
    from billhook.reports.publishing import publish, render
    from billhook.reports.quantized_card import is_quantized, publish_quantized
    from billhook.store.files import read_json
    from billhook.store.layout import CARD

    if not directory.is_dir():
        raise BillhookError(f"There is no directory {directory}.")
    if is_quantized(directory):
        if speed is not None or table is not None:
            raise BillhookError(f"The card of {directory}, which is quantized, has no place for --speed and --table.")
        publish_quantized(directory)
        say(f"{directory}: README.md.")
        if as_json:
            emit({"card": str(directory / CARD)})
        return
    changes: dict[str, Any] = {} if speed is None else {"speed": read_json(speed, "benchmark result")}
    if table is not None:
        changes["spectra"] = spectra_of(Table.load(table), render(directory)[0])
    report = publish(directory, changes)
    say(f"{directory}: report.json, README.md and report.html, with {len(report['evaluations'])} evaluations.")
    if as_json:
        emit(report)
