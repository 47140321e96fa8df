"""The report of a model without some of its units: its card README.md, made from billhook.json by templates/slim.md.j2,
and shape.json, the plan of the numbers of parts that stayed, which can be edited and given to `billhook slim`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from billhook.evaluation.quality import SCALE, Loss
from billhook.plan.plan import Plan
from billhook.reports.card import before_last, hub_metadata, table, template
from billhook.reports.report import source_metadata
from billhook.store.files import untrusted, write_text
from billhook.store.layout import CARD, RECORD, SHAPE
from billhook.store.record import Record, read_record
from billhook.store.shards import result_bytes

_NAMED = ("heads", "experts")  # kinds of which a model has so few parts in a block that each is named


@dataclass(frozen=True)
class Stayed:
    """What a run of `slim` removed, and a table of what stayed by block (`header` and `rows`).

    Blocks are numbered as before the run. Of the parameters in the blocks of the first model the fraction `removed`
    went, in all runs, and `padding` is stored as zeros by this one.
    """

    removed: float
    padding: float
    lost: Mapping[str, Any] | None
    header: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, record: Record) -> "Stayed":
        """From the last step that removed units."""
        *earlier, made_by = [step.made_by for step in record.steps if step.step == "slim"]
        kinds = list(dict.fromkeys(name.rpartition(":")[2] for name in made_by["kept"]))
        blocks: dict[int, dict[str, list[str]]] = {block: {} for block in made_by["dropped"]}
        for name in made_by["kept"]:
            number = next(int(word) for word in name.replace(":", ".").split(".") if word.isdigit())
            blocks.setdefault(number, {}).setdefault(name.rpartition(":")[2], []).append(name)
        rows = []
        for number, units in sorted(blocks.items()):
            cells = [_cell(kind, units.get(kind, ()), made_by) for kind in kinds]
            rows.append([str(number), *(cells if units else ["dropped", *[""] * (len(kinds) - 1)])])
        lost = record.steps[-1].made_by.get("lost")
        header = ["block", *(kinds or ["what stayed"])]
        had = prod(1 - run["removed"] for run in earlier)  # of the parameters in blocks, before the last run
        removed = 1 - had + had * made_by["removed"]
        return cls(removed, had * made_by.get("padding", 0.0), lost, header, rows)

    def to_json(self) -> dict[str, Any]:
        """The facts of `report --json`."""
        rows = [dict(zip(self.header, row, strict=True)) for row in self.rows]
        return {"removed": self.removed, "padding": self.padding, "lost": self.lost, "stayed": rows}


def _cell(kind: str, units: Sequence[str], made_by: Mapping[str, Any]) -> str:
    """How many parts stayed in the units of a kind in a block, and which."""
    if not units:
        return ""
    kept, had = made_by["kept"], made_by.get("parts", {})
    counts = sorted({len(kept[unit]) for unit in units})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    of = f" of {had[units[0]]}" if units[0] in had else ""
    return f"{number}{of}" + (f": {_ranges(kept[units[0]])}" if kind in _NAMED else "")


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order as text, such as 0-2, 5."""
    found = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        found.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ", ".join(found)


def publish_slim(folder: Path) -> Stayed:
    """Write the card of a directory that a run of `slim` made, which names no local path, and shape.json.

    Returns what they say; raises BillhookError for a damaged record.
    """
    with untrusted(f"{folder / RECORD} is damaged", "Remove its units again."):
        record = read_record(folder / RECORD)
        stayed, text = Stayed.of(record), _card(folder, record)
        plan = next(step.plan for step in reversed(record.steps) if step.step == "slim")
        Plan.from_json(plan or {}, RECORD).save(folder / SHAPE)
        write_text(folder / CARD, text)
        return stayed


def _card(folder: Path, record: Record) -> str:
    import yaml

    source, stayed = source_metadata(folder), Stayed.of(record)
    *earlier, made_by = [step.made_by for step in record.steps if step.step == "slim"]
    trained = [step.made_by for step in record.steps if step.step == "recover"]
    name = record.steps[0].model["name"]
    metadata = hub_metadata(source, name, ["billhook", "pruned"], library="transformers")
    text: str = template("slim.md.j2", html=False).render(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=name,
        removed=f"{stayed.removed:.1%}",
        padding=f"{stayed.padding:.1%}" if stayed.padding else "",
        size=f"{result_bytes(folder):,}",
        numbered="before the last removal" if earlier else "in the original",
        units=table(stayed.header, stayed.rows),
        lost=None if stayed.lost is None else str(Loss(**stayed.lost)),
        before=before_last([step.step for step in record.steps]),
        scale=SCALE,
        method=made_by["method"],
        experts=made_by.get("experts"),
        paper=made_by["papers"]["method"],
        trained=[f"{x['tokens']:,} tokens for the objective `{x['objective']}`" for x in trained],
        version=record.billhook,
    )
    return text
