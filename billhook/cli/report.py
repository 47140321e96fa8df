"""`billhook report`: write the report, model card and page of a pruned directory again."""

from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.cli.common import emit, say
from billhook.cli.common import table as show_table
from billhook.cli.options import Json

NAME = "report"
EXAMPLES = """\b
Examples:
  billhook report ./pruned
  billhook report ./pruned --speed bench.json
  billhook report ./pruned --table table.json
  billhook report ./small
"""
SPEED_HELP = "The result of a benchmark, such as the output of billhook bench --json."
TABLE_HELP = "A table.json of the dense model: adds its spectral metrics to the page."


def command(
    directory: Annotated[Path, typer.Argument(help="A pruned, slimmed or quantized directory.", metavar="DIR")],
    *,
    speed: Annotated[Path | None, typer.Option(help=SPEED_HELP, metavar="FILE")] = None,
    table: Annotated[Path | None, typer.Option(help=TABLE_HELP, metavar="TABLE")] = None,
    as_json: Json = False,
) -> None:
    """Write report.json, the model card README.md and report.html of a pruned directory again.

    Of a slimmed directory, what stayed by block is printed, and the card and shape.json are written; of a quantized
    one, only the card.
    """
    from billhook.errors import BillhookError
    from billhook.plan.densities import spectra_of
    from billhook.plan.table import Table
    from billhook.reports.publishing import publish, render
    from billhook.reports.quantized_card import publish_quantized
    from billhook.store import not_a_model
    from billhook.store.files import read_json
    from billhook.store.layout import CARD, RECORD
    from billhook.store.record import last_made, read_record

    if not directory.is_dir():
        raise BillhookError(f"{directory} is a file." if directory.exists() else f"There is no directory {directory}.")
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise BillhookError(not_a_model.directory(directory))
    made = last_made(read_record(directory / RECORD)) if (directory / RECORD).is_file() else ""
    if made in ("slim", "quantize"):
        if speed is not None or table is not None:
            kind = {"slim": "slimmed", "quantize": "quantized"}[made]
            raise BillhookError(f"The card of {directory}, which is {kind}, has no place for --speed and --table.")
        facts: dict[str, Any] = {"card": str(directory / CARD)}
        if made == "slim":
            facts |= _slimmed(directory, as_json)
        else:
            publish_quantized(directory)
            say(f"{directory}: README.md.")
        if as_json:
            emit(facts)
        return
    changes: dict[str, Any] = {} if speed is None else {"speed": read_json(speed, "benchmark result")}
    if table is not None:
        changes["spectra"] = spectra_of(Table.load(table), render(directory)[0])
    report = publish(directory, changes)
    say(f"{directory}: report.json, README.md and report.html, with {len(report['evaluations'])} evaluations.")
    if as_json:
        emit(report)


def _slimmed(directory: Path, as_json: bool) -> dict[str, Any]:
    """Write and show the report of a slimmed directory, its table not where stdout has json; returns its facts."""
    from billhook.evaluation.quality import Loss
    from billhook.reports.slim_card import publish_slim

    stayed = publish_slim(directory)
    if not as_json:
        show_table("What stayed", stayed.header, stayed.rows)
    padding = f", {stayed.padding:.1%} stored as zeros" if stayed.padding else ""
    say(f"{stayed.removed:.1%} of the parameters in blocks removed{padding}.")
    if stayed.lost is not None:
        say(f"{Loss(**stayed.lost)}.")
    say(f"{directory}: README.md and shape.json.")
    return stayed.to_json()
