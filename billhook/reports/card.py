"""The model card: README.md with the metadata that the Hugging Face hub reads, made from report.json."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.store.layout import PAGE

_DENSE = (
    "The model needs nothing but `transformers`.",
    "```python\nimport transformers\n\nmodel = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)\n```",
    "Zeros are stored like other weights, so the files are as large and the model is as fast as the dense one. "
    "`billhook pack FOLDER` writes smaller files, which Billhook runs with sparse kernels.",
)
_PACKED = (
    "Packed: sparse weights are stored as a bitmask and the values that are not zero. Loading it needs Billhook.",
    "```python\nimport billhook\n\nmodel = billhook.load(FOLDER)\n```",
    "This gives a `transformers` model, for inference only. `billhook unpack FOLDER -o DENSE` gives a model directory "
    "that needs nothing but `transformers`.",
)


def card(report: Mapping[str, Any]) -> str:
    """The text of README.md."""
    model, achieved = report["model"], report["achieved"]
    parts = [
        _metadata(report),
        f"# {model['name']}, {100 * achieved['sparsity']:.3g} % sparse",
        f"{_sentence(report)} The full report, with pictures, is in [{PAGE}]({PAGE}).",
        "## Loading",
        *(_PACKED if report["files"]["packed"] else _DENSE),
        "## Results",
        _numbers(report),
        "## Method",
        "\n".join(_method(report)),
        "## Limitations",
        "\n".join(_limitations(report)),
        f"Pruned with Billhook {report['made_with']}. `billhook verify FOLDER` checks the files and counts the zeros.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sentence(report: Mapping[str, Any]) -> str:
    asked, achieved = report["asked"], report["achieved"]
    return (
        f"This is {report['model']['name']} ({report['model']['type']}) with {achieved['zeros']:,} of "
        f"{achieved['weights']:,} prunable weights ({100 * achieved['sparsity']:.2f} %) set to zero. Criterion: "
        f"{asked['criterion']}; allocation: {asked['allocator']}; pattern: {asked['pattern']}."
    )


def _metadata(report: Mapping[str, Any]) -> str:
    name, asked = report["model"]["name"], report["asked"]
    lines = [f"{key}: {value}" for key, value in report["metadata"].items()]
    if "/" in name:
        lines.append(f"base_model: {json.dumps(name)}\nbase_model_relation: finetune")
    tags = ["billhook", "pruned", "sparse", asked["criterion"], asked["allocator"].replace(" ", "-")]
    library = "billhook" if report["files"]["packed"] else "transformers"
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in tags]
    return "---\n" + "\n".join([*lines, *_model_index(report)]) + "\n---"


def _model_index(report: Mapping[str, Any]) -> list[str]:
    """The evaluations as the hub's `model-index`."""
    entries = []
    for record in report["evaluations"]:
        word = record.get("word") or {}
        if record.get("token_ppl") is not None:
            label = "Token perplexity (non-overlapping windows)"
            entries.append((record["source"], label, "perplexity", record["token_ppl"]))
        if word.get("word_ppl") is not None:
            label = "Word perplexity (lm-evaluation-harness)"
            entries.append((word["source"], label, "perplexity", word["word_ppl"]))
        entries += [(task["task"], "Accuracy", "accuracy", task["acc"]) for task in record.get("tasks", [])]
    if not entries:
        return []
    found = ["model-index:", f"- name: {json.dumps(report['model']['name'] + '-pruned')}", "  results:"]
    for data, label, kind, value in entries:
        found += ["  - task:", "      type: text-generation", "    dataset:"]
        found += [f"      name: {json.dumps(data)}", f"      type: {json.dumps(data)}"]
        found += ["    metrics:", f"    - name: {json.dumps(label)}", f"      type: {kind}"]
        found += [f"      value: {value:.6g}"]
    return found


def evaluation_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The evaluations: measure with its protocol, data, this model, dense model."""
    rows = []
    for record in report["evaluations"]:
        dense = record.get("against") or {}
        dense_ppl = "-" if dense.get("token_ppl") is None else f"{dense['token_ppl']:.4f}"
        begun = ", each after BOS" if record.get("bos") else ""
        windows = f"{record.get('windows')} windows of {record.get('length')}{begun}"
        where = f"{record['source']}, {windows}" if "nll" in record else ""
        if where:
            label = "token perplexity, non-overlapping windows (lower is better)"
            rows.append([label, where, f"{record['token_ppl']:.4f}", dense_ppl])
        if dense:
            top1 = f"{100 * dense['top1_agreement']:.2f} %"
            rows.append(["KL divergence from the dense model, nats per token", where, f"{dense['kl']:.4f}", "0"])
            rows.append(["top-1 agreement with the dense model", where, top1, "100 %"])
        if word := record.get("word"):
            where = f"{word['source']}, {word['documents']} documents, windows of {word['length']}"
            label = "word perplexity, protocol of lm-evaluation-harness (lower is better)"
            rows.append([label, where, f"{word['word_ppl']:.4f}", "-"])
        for task in record.get("tasks", []):
            error = "" if task["acc_error"] is None else f" ± {100 * task['acc_error']:.2f}"
            where = f"{task['task']}, {task['items']} items, {task['few_shot']}, {task['scored_by']}"
            rows.append(["accuracy", where, f"{100 * task['acc']:.2f}{error} %", "-"])
    return rows


def _numbers(report: Mapping[str, Any]) -> str:
    achieved, files = report["achieved"], report["files"]
    rows = [["sparsity of the prunable weights", "counted in the files", f"{100 * achieved['sparsity']:.4f} %", "-"]]
    rows.append(["weight files, MiB", "this directory", _mib(files["weights_bytes"]), "-"])
    if not files["packed"]:
        rows.append(["weight files when packed, MiB", "estimate", _mib(files["packed_bytes_estimate"]), "-"])
    text = table(["measure", "on", "this model", "dense model"], [*rows, *evaluation_rows(report)])
    note = "No evaluation yet: add one with `billhook eval FOLDER --data SOURCE --against DENSE --report`."
    return text if report["evaluations"] else f"{text}\n\n{note}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _method(report: Mapping[str, Any]) -> list[str]:
    asked, papers, text = report["asked"], report["papers"], report["calibration"]
    lines = [f"* Step {number}: {line}." for number, line in enumerate(report.get("steps", ()), start=1)]
    for key, paper in (("criterion", papers["criterion"]), ("allocator", papers["allocator"] or "Given by the user")):
        options = options_text(asked[f"{key}_options"])
        name = "Criterion" if key == "criterion" else "Allocation"
        lines.append(f"* {name}: `{asked[key]}`{f' ({options})' if options else ''}. {paper}.")
    target = f"{100 * asked['sparsity']:g} %; pattern: {asked['pattern']}; comparison group: {asked['group']}"
    calibration = "not needed"
    if text:
        begun = ", each window after BOS" if text.get("bos") else ""
        sampling = f"{text['sampling']} sampling{begun}, seed {asked['seed']}"
        windows = f"{text['samples']} windows of {text['length']} tokens"
        calibration = f"{windows} of {text['source']} ({sampling})"
    lines += [f"* Target sparsity: {target}.", f"* Calibration: {calibration}."]
    return [*lines, "* Versions: " + ", ".join(f"{name} {n}" for name, n in report["versions"].items()) + "."]


def options_text(options: Mapping[str, Any]) -> str:
    """Options as `key=value, key=value`."""
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _limitations(report: Mapping[str, Any]) -> list[str]:
    lines = ["* The model was not trained after pruning and is worse than the dense one, above all in rare knowledge."]
    if report["calibration"]:
        lines.append("* Weights were chosen on the calibration text: other languages and subjects may have lost more.")
    lines.append("* Ordinary fine-tuning makes the zeros nonzero again.")
    lines += [f"* {warning}" for warning in report["warnings"][:20]]
    rest = len(report["warnings"]) - 20
    return [*lines, f"* {rest} more warnings are in {PAGE}."] if rest > 0 else lines
