"""Write the report of a pruned directory: report.json, the model card README.md, and report.html.

billhook.json has no checksums of them, because evaluations are added later and the files can always be made again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.reports.card import card
from billhook.reports.page import page
from billhook.reports.report import build, load_report
from billhook.store.files import untrusted, write_json, write_text
from billhook.store.layout import CARD, PAGE, RECORD, REPORT


def publish(folder: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write report.json, card and page of a directory, and return the report.

    What follows from billhook.json is computed again; what was added later (evaluations, speed, spectra) is kept from
    report.json, or replaced by `changes`. Raises BillhookError where both files are missing or one is damaged.
    """
    report, texts = render(folder, changes)
    write_json(folder / REPORT, report)
    for name, text in texts.items():
        write_text(folder / name, text)
    return report


def render(folder: Path, changes: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """The report that `publish` would write, and the texts of card and page by file name; raises what it raises."""
    advice = f"Delete {REPORT} and run billhook report {folder}."
    with untrusted(f"{folder} holds a damaged {REPORT} or {RECORD}", advice):
        report = known(folder) | dict(changes or {})
        list(map(_identity, report["evaluations"]))
        return report, {CARD: card(report), PAGE: page(report)}


def known(folder: Path) -> dict[str, Any]:
    """The report of a directory as it would be written now; raises what `publish` raises."""
    if not (folder / REPORT).is_file() and not (folder / RECORD).is_file():
        raise BillhookError(f"{folder} has no results to report: neither {REPORT} nor {RECORD}.")
    report = load_report(folder) if (folder / REPORT).is_file() else {}
    if (folder / RECORD).is_file():
        added = {key: report[key] for key in ("evaluations", "speed", "spectra", "metadata") if key in report}
        report = build(folder) | added
    return report


def add_evaluation(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Add an evaluation to a directory's report, replacing one of the same data and tasks; returns the report."""
    report, _ = render(folder)
    kept = [entry for entry in report["evaluations"] if _identity(entry) != _identity(record)]
    return publish(folder, {"evaluations": [*kept, dict(record)]})


def _identity(entry: Mapping[str, Any]) -> list[Any]:
    """The protocol, data and tasks of an evaluation."""
    tasks = [(task["task"], task["identity"], task["few_shot"]) for task in entry.get("tasks", [])]
    word = entry.get("word") or {}
    return [*map(entry.get, ("protocol", "digest", "length")), word.get("source"), word.get("length"), tasks]
