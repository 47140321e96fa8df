"""The model card of a model without some of its units: README.md, made from billhook.json by templates/slim.md.j2."""

from collections.abc import Mapping
from pathlib import Path

from billhook.evaluation.quality import SCALE, Loss
from billhook.reports.card import table, template
from billhook.reports.report import source_metadata
from billhook.store.files import write_text
from billhook.store.layout import CARD, RECORD
from billhook.store.record import read_record
from billhook.store.shards import result_bytes


def publish_slim(folder: Path) -> None:
    """Write the card of a directory that a run of `slim` made; it names no local path."""
    import yaml

    record, source = read_record(folder / RECORD), source_metadata(folder)
    made_by = next(step.made_by for step in reversed(record.steps) if step.step == "slim")
    trained = [step.made_by for step in record.steps if step.step == "recover"]
    name = record.steps[0].model["name"]
    base = name if "/" in name else source.pop("base_model", None)
    metadata = {**source, **({"base_model": base, "base_model_relation": "finetune"} if base else {})}
    metadata |= {"library_name": "transformers"}
    metadata |= {"tags": list(dict.fromkeys([*source.get("tags", []), "billhook", "pruned"]))}
    lost = record.steps[-1].made_by.get("lost")
    text: str = template("slim.md.j2", html=False).render(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=name,
        removed=f"{made_by['removed']:.1%}",
        size=f"{result_bytes(folder):,}",
        units=table(["kind", "units", "parts that stayed"], _rows(made_by["kept"])),
        lost=None if lost is None else str(Loss(**lost)),
        scale=SCALE,
        method=made_by["method"],
        paper=made_by["papers"]["method"],
        trained=[f"{x['tokens']:,} tokens for the objective `{x['objective']}`" for x in trained],
        version=record.billhook,
    )
    write_text(folder / CARD, text)


def _rows(kept: Mapping[str, list[int]]) -> list[list[str]]:
    """For each kind of units, how many there are and how many parts stayed in each."""
    kinds: dict[str, list[int]] = {}
    for name, parts in kept.items():
        kinds.setdefault(name.rpartition(":")[2], []).append(len(parts))
    return [
        [kind, str(len(n)), str(n[0]) if min(n) == max(n) else f"{min(n)} to {max(n)}"] for kind, n in kinds.items()
    ]
