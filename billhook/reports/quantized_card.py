"""The model card of a quantized model: README.md, made from billhook.json by the template templates/quantized.md.j2."""

from collections import Counter
from pathlib import Path

from billhook.evaluation.quality import SCALE, Loss
from billhook.plan.storage import bits
from billhook.reports.card import before_last, hub_metadata, table, template
from billhook.reports.report import source_metadata
from billhook.store.files import untrusted, write_text
from billhook.store.layout import CARD, RECORD
from billhook.store.record import read_record
from billhook.store.shards import result_bytes

_FORMATS = ("quantized", "gguf", "compressed-tensors")  # tags


def publish_quantized(folder: Path) -> None:
    """Write the card of a directory that a run of `quantize` or `compress` made; it names no local path.

    Raises BillhookError for a damaged record.
    """
    text = ""
    with untrusted(f"{folder / RECORD} is damaged", "Quantize again."):
        text = _card(folder)
    write_text(folder / CARD, text)


def _card(folder: Path) -> str:
    import yaml

    record, source = read_record(folder / RECORD), source_metadata(folder)
    step = next(step for step in reversed(record.steps) if step.step == "quantize")
    trained, files = record.steps[-1].step == "recover", sorted(folder.glob("*.gguf"))
    name, made_by = record.steps[0].model["name"], step.made_by
    types = Counter(facts["type"] for facts in record.layers.values() if facts.get("type"))
    tags, library = (
        ["billhook", "quantized", "gguf" if files else "compressed-tensors"],
        "gguf" if files else "transformers",
    )
    metadata = hub_metadata(source, name, tags, library=library, relation="quantized")
    lost, done = record.steps[-1].made_by.get("lost"), [step.step for step in record.steps]
    whole = "units" in (step.plan or {}).get("made_by", {})  # both steps are one run, scored against its input
    rows = [[type, f"{bits(type):.2f}", str(types[type])] for type in sorted(types, key=bits, reverse=True)]
    text: str = template("quantized.md.j2", html=False).render(
        metadata=yaml.safe_dump(metadata, allow_unicode=True),
        name=name,
        size=f"{result_bytes(folder):,}",
        removed=", ".join(f"{step.made_by['removed']:.1%}" for step in record.steps if step.step == "slim"),
        types=table(["type", "bits a weight", "layers"], rows),
        outside=made_by.get("outside") or {},
        lost=None if lost is None else str(Loss(**lost)),
        before="" if whole else before_last(done),
        scale=SCALE,
        gguf=files[0].name if files else None,
        parts=len(files),
        quantizer=made_by["quantizer"],
        paper=made_by["papers"]["quantizer"],
        allocator=(step.plan or {}).get("made_by", {}).get("allocator", "a plan"),
        trained=trained,
        version=record.billhook,
    )
    return text


def decoded_card(folder: Path) -> str:
    """The card of a directory whose weights were quantized and are decoded again; it names no local path."""
    import yaml

    record, source = read_record(folder / RECORD), source_metadata(folder)
    made_by = next(step.made_by for step in reversed(record.steps) if step.step == "quantize")
    own = {**source, "library_name": "transformers", "tags": [x for x in source.get("tags", []) if x not in _FORMATS]}
    lost = made_by.get("lost")
    quality = "" if lost is None else f" Quality: {Loss(**lost)}. The verdict is that of the KL divergence: {SCALE}."
    what = "These are the weights of a quantized model as ordinary 16-bit weights: they take the space of the original,"
    parts = [
        f"---\n{yaml.safe_dump(own, allow_unicode=True)}---\n",
        f"# {record.steps[0].model['name']}, quantized and decoded\n",
        f"{what} and have lost what the quantized ones have lost.{quality}\n",
        f"Made with Billhook {record.billhook}. `billhook verify FOLDER` checks the files.\n",
    ]
    return "\n".join(parts)
