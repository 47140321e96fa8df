"""report.json (docs/formats): the facts about a pruned directory, from billhook.json and the sizes of its weight files.

The same run gives the same bytes: there are no dates and no durations.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import billhook
from billhook.errors import BillhookError
from billhook.packed.format import open_packed
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.store.files import read_json, untrusted
from billhook.store.layout import CARD, RECORD, REPORT, is_packed
from billhook.store.record import Record, Step, last_made, read_record
from billhook.store.shards import read_shard, weight_files
from billhook.store.typed_json import typed

VERSION = 1
_KEPT = ("license", "license_name", "license_link", "language", "base_model", "tags")  # of the source's card
_TEXT = "text-generation"
_TAGS = {"ForMaskedLM": "fill-mask", "ForImageClassification": "image-classification"}
_TAGS |= {"Model": "feature-extraction"}  # by the end of a class's name
_HEAD = 1 << 16  # letters of a card in which its metadata must end
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_report(folder: Path) -> dict[str, Any]:
    """Read DIR/report.json; raises BillhookError where it is missing, of another version or damaged."""
    path = folder / REPORT
    report = read_json(path, "report")
    if report.get("version") != VERSION:
        raise BillhookError(f"{path} is not a report of version {VERSION}: run billhook report {folder}.")
    for key in ("evaluations", "layers"):
        typed(list[dict[str, Any]], report.get(key), f"{path} is damaged, {key}")
    return report


def build(folder: Path) -> dict[str, Any]:
    """The content of report.json without evaluations; raises BillhookError for a damaged record, or of another step."""
    record = read_record(folder / RECORD)
    if record.steps and last_made(record) != "prune":
        done = f"{record.steps[-1].step!r:.40}"
        own = f"Its {CARD} is its report; it is written again with billhook report {folder}."
        advice = own if last_made(record) in ("slim", "quantize") else f"There is no report of that but its {CARD}."
        raise BillhookError(f"{folder} is no pruned directory: its last step is {done}. {advice}")
    with untrusted(f"{folder / RECORD} is damaged", "Prune again."):
        return _from_record(folder, record)


def _from_record(folder: Path, record: Record) -> dict[str, Any]:
    last = [step for step in record.steps if step.step == "prune"][-1]
    plan, made_by = Plan.from_json(last.plan or {}, RECORD), last.made_by
    columns, quantiles = plan.made_by.get("metrics", {}), plan.made_by.get("spectra") or {}
    spectra = {layer: list(map(float, values)) for layer, values in quantiles.items()}
    # a training adds layers that no plan names
    layers = [_layer(name, facts, columns) for name, facts in record.layers.items() if "sparsity" in facts]
    weights, zeros = sum(_size(layer) for layer in layers), sum(layer["zeros"] for layer in layers)
    return {
        "version": VERSION,
        "billhook": billhook.__version__,
        "lost": record.steps[-1].made_by.get("lost"),
        "better_recipe": made_by.get("better_recipe"),
        "made_with": record.billhook,
        "model": {key: record.steps[0].model[key] for key in ("name", "type", "digest")},
        "steps": [_line(step) for step in record.steps],
        "asked": _asked(plan, made_by),
        "achieved": {"sparsity": zeros / weights, "zeros": zeros, "weights": weights, "layers": len(layers)},
        "files": _sizes(folder, layers),
        "layers": layers,
        "blocks": _blocks(layers),
        **{key: made_by[key] for key in ("calibration", "gradients", "papers", "versions")},
        "warnings": [warning for step in record.steps for warning in step.warnings],
        "evaluations": [],
        "speed": None,
        "spectra": {"metrics": {}, "quantiles": spectra} if spectra else None,
        "metadata": source_metadata(folder),
    }


def _asked(plan: Plan, made_by: Mapping[str, Any]) -> dict[str, Any]:
    """The request of the run, from its plan and `made_by` of billhook.json."""
    keys = ("criterion", "criterion_options", "group", "seed", "dtype", "device", "targets", "ignore")
    return {
        "sparsity": plan.target,
        "pattern": str(plan.pattern),
        "allocator": plan.made_by.get("allocator") or "explicit plan",
        "allocator_options": plan.made_by.get("options", {}),
        "recipe": made_by.get("recipe"),
        "published": made_by.get("published", made_by.get("rounding") == "floor"),
        **{key: made_by[key] for key in keys},
    }


def _line(step: Step) -> str:
    """A step in one line: its name, budget, criterion and allocation."""
    if step.plan is None:
        made_by = step.made_by
        trained = f"recover: objective {made_by.get('objective')}, {made_by.get('tokens')} tokens"
        trained = f"recover: block by block, {made_by['epochs']} epochs" if "epochs" in made_by else trained
        return trained if step.step == "recover" else step.step
    plan = Plan.from_json(step.plan, RECORD)
    kind, value = plan.budget.kind, plan.budget.value
    much = f"{100 * value:g} % of the weights" if kind == "sparsity" else f"to {value:,} {kind}"
    parts = [f"{step.step}: {much}, {len(plan.weights)} layers", str(plan.pattern)]
    parts += [f"criterion {step.made_by['criterion']}"] if "criterion" in step.made_by else []
    return ", ".join([*parts, f"allocation {plan.made_by.get('allocator') or 'explicit plan'}"])


def _size(layer: Mapping[str, Any]) -> int:
    out, columns = layer["shape"]
    return int(out * columns)


def _layer(name: str, facts: Mapping[str, Any], columns: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    words = [part for part in name.split(".") if not part.isdigit()]
    return {
        "layer": name,
        "block": numbers[0] if numbers else 0,
        "kind": words[-1],
        "shape": facts["shape"],
        "planned": facts["sparsity"],
        "sparsity": facts["zeros"] / (facts["shape"][0] * facts["shape"][1]),
        "zeros": facts["zeros"],
        "error": facts.get("error"),
        "metrics": {metric: values[name] for metric, values in columns.items() if name in values},
        "notes": facts.get("notes", []),
    }


def _blocks(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each block: sparsity over all weights, lowest and highest sparsity of a layer, and means of other numbers."""
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for layer in layers:
        grouped.setdefault(layer["block"], []).append(layer)
    found = []
    for block, rows in sorted(grouped.items()):
        total = sum(map(_size, rows))
        errors = [row["error"] for row in rows if row["error"] is not None]
        names = dict.fromkeys(name for row in rows for name in row["metrics"])
        values = {name: [row["metrics"][name] for row in rows if name in row["metrics"]] for name in names}
        found.append(
            {
                "block": block,
                "planned": sum(row["planned"] * _size(row) for row in rows) / total,
                "sparsity": sum(row["zeros"] for row in rows) / total,
                "least": min(row["sparsity"] for row in rows),
                "most": max(row["sparsity"] for row in rows),
                "error": sum(errors) / len(errors) if errors else None,
                "metrics": {name: sum(numbers) / len(numbers) for name, numbers in values.items()},
            }
        )
    return found


def _sizes(folder: Path, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes of the weight files, and an estimate of them when packed."""
    if is_packed(folder):
        size = sum(shard.file.path.stat().st_size for shard in open_packed(folder).shards)
        return {"packed": True, "weights_bytes": size, "packed_bytes_estimate": size}
    files = weight_files(folder)
    dense = sum(file.stat().st_size for file in files)
    entries = [entry for file in files for entry in read_shard(file).entries.values()]
    item = sum(e.stop - e.start for e in entries) / max(1, sum(math.prod(e.shape) for e in entries))  # mean bytes
    saved = 0.0
    for layer in layers:
        out, columns = layer["shape"]
        kept = out * columns - layer["zeros"]
        saved += max(0.0, item * out * columns - (item * kept + 64 + 8 * out * -(-columns // 64)))
    return {"packed": False, "weights_bytes": dense, "packed_bytes_estimate": round(dense - saved)}


def source_metadata(folder: Path) -> dict[str, Any]:
    """What the card of the source says about licence, language, kind and origin; nothing else of it is trusted."""
    import yaml

    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")[:_HEAD] if (folder / CARD).is_file() else ""
    head = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        found = {}
    found = found if isinstance(found, dict) else {}
    kept = {key: texts for key in _KEPT if (texts := _texts(found.get(key)))}
    kept["base_model"] = [name for name in kept.get("base_model", []) if _HUB_NAME.fullmatch(name)]
    path = folder / "config.json"
    config = read_json(path, "model configuration", own=False) if path.is_file() else {}
    kept["pipeline_tag"] = [_pipeline(config)]
    return {key: texts if key == "tags" or len(texts) > 1 else texts[0] for key, texts in kept.items() if texts}


def _pipeline(config: Mapping[str, Any]) -> str:
    """The pipeline of transformers for the model of a config.json."""
    names = [str(name) for name in config.get("architectures") or ()]
    tag = next((tag for end, tag in _TAGS.items() for x in names if x.endswith(end)), _TEXT)
    if tag == "feature-extraction" and ("image_size" in config or "num_channels" in config):
        return "image-feature-extraction"
    if tag == _TEXT and config.get("is_encoder_decoder"):
        return "automatic-speech-recognition" if "num_mel_bins" in config else "text2text-generation"
    return "image-text-to-text" if tag == _TEXT and "vision_config" in config else tag


def _texts(value: Any) -> list[str]:
    """A text or a list of texts as a list; empty for anything else."""
    several = value if isinstance(value, list) else [value]
    return several if all(isinstance(text, str) and text for text in several) else []


def pattern_in_words(text: str) -> str:
    """A description of a pattern."""
    pattern = Pattern.parse(text)
    return f"{pattern.keep} of every {pattern.of} weights kept" if pattern.structured else "unstructured"
