"""The model card: README.md with the metadata that the Hugging Face hub reads, made from report.json."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.store.layout import PAGE

_DENSE = (
    "An ordinary model directory: nothing but `transformers` is needed.",
    "```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = "
    "AutoModelForCausalLM.from_pretrained(FOLDER)\n```",
    "The zeros are stored like other weights, so this directory is as large and as fast as the dense model's. "
    "`billhook pack FOLDER` "
    "writes a smaller one that Billhook runs with sparse kernels.",
)
_PACKED = (
    "Packed: sparse weights are stored as a bitmask and the weights that are left. Billhook is needed to open it.",
    "```python\nimport billhook\n\nmodel = billhook.load(FOLDER)\n```",
    "The model is one of `transformers`, for inference. `billhook unpack FOLDER -o DENSE` gives an ordinary "
    "model directory.",
)


def card(report: Mapping[str, Any]) -> str:
    """The text of README.md."""
    model, achieved = report["model"], report["achieved"]
    parts = [
        _metadata(report),
        f"# {model['name']}, {100 * achieved['sparsity']:.3g} % sparse",
        f"{_sentence(report)} Everything about the run, with pictures, is in [{PAGE}]({PAGE}).",
        "## How to load it",
        *(_PACKED if report["files"]["packed"] else _DENSE),
        "## Numbers",
        _numbers(report),
        "## How it was made",
        "\n".join(_made(report)),
        "## Limits",
        "\n".join(_limits(report)),
        f"Pruned with Billhook {report['made_with']}; `billhook verify FOLDER` recounts every zero from the files.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sentence(report: Mapping[str, Any]) -> str:
    asked, achieved = report["asked"], report["achieved"]
    return (
        f"This is {report['model']['name']} ({report['model']['type']}) with {achieved['zeros']:,} of "
        f"{achieved['weights']:,} prunable "
        f"weights ({100 * achieved['sparsity']:.2f} %) set to zero: which ones by {asked['criterion']}, how many "
        "in each layer by "
        f"{asked['allocator']}, pattern {asked['pattern']}."
    )


def _metadata(report: Mapping[str, Any]) -> str:
    name, asked = report["model"]["name"], report["asked"]
    lines = [f"{key}: {value}" for key, value in report["metadata"].items()]
    if "/" in name:
        lines.append(f"base_model: {json.dumps(name)}\nbase_model_relation: finetune")
    tags = ["billhook", "pruned", "sparse", asked["criterion"], asked["allocator"].replace(" ", "-")]
    library = "billhook" if report["files"]["packed"] else "transformers"
    lines += [
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    return "---\n" + "\n".join([*lines, *_results(report)]) + "\n---"


def _results(report: Mapping[str, Any]) -> list[str]:
    """The evaluations in the hub's `model-index`."""
    entries = []
    for record in report["evaluations"]:
        if record.get("token_ppl") is not None:
            entries.append(
                (record["source"], "Token perplexity (non-overlapping windows)", "perplexity", record["token_ppl"])
            )
        if (record.get("word") or {}).get("word_ppl") is not None:
            entries.append(
                (
                    record["word"]["source"],
                    "Word perplexity (lm-evaluation-harness)",
                    "perplexity",
                    record["word"]["word_ppl"],
                )
            )
        entries += [(task["task"], "Accuracy", "accuracy", task["acc"]) for task in record.get("tasks", [])]
    if not entries:
        return []
    found = ["model-index:", f"- name: {json.dumps(report['model']['name'] + '-pruned')}", "  results:"]
    for data, label, kind, value in entries:
        found += [
            "  - task:",
            "      type: text-generation",
            "    dataset:",
            f"      name: {json.dumps(data)}",
            f"      type: {json.dumps(data)}",
        ]
        found += [
            "    metrics:",
            f"    - name: {json.dumps(label)}",
            f"      type: {kind}",
            f"      value: {value:.6g}",
        ]
    return found


def evaluation_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """What was measured: measure, data, this model, dense model; each number with its protocol."""
    rows = []
    for record in report["evaluations"]:
        dense = record.get("against") or {}
        if "nll" in record:
            where = f"{record['source']}, {record['windows']} windows of {record['length']}"
            rows.append(
                [
                    "token perplexity, non-overlapping windows (lower is better)",
                    where,
                    _ppl(record["token_ppl"]),
                    _ppl(dense.get("token_ppl")),
                ]
            )
        if dense:
            rows.append(["KL divergence from the dense model, nats a token", where, f"{dense['kl']:.4f}", "0"])
            rows.append(
                [
                    "same likeliest next token as the dense model",
                    where,
                    f"{100 * dense['top1_agreement']:.2f} %",
                    "100 %",
                ]
            )
        if word := record.get("word"):
            where = f"{word['source']}, {word['documents']} documents, windows of {word['length']}"
            rows.append(
                [
                    "word perplexity, lm-evaluation-harness's protocol (lower is better)",
                    where,
                    _ppl(word["word_ppl"]),
                    "-",
                ]
            )
        for task in record.get("tasks", []):
            error = "" if task["acc_error"] is None else f" ± {100 * task['acc_error']:.2f}"
            where = f"{task['task']}, {task['items']} items, {task['few_shot']}, {task['scored_by']}"
            rows.append(["accuracy", where, f"{100 * task['acc']:.2f}{error} %", "-"])
    return rows


def _ppl(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _numbers(report: Mapping[str, Any]) -> str:
    computed = [
        "the same, packed as bitmask and values, MiB",
        "computed",
        _mib(report["files"]["packed_bytes_estimate"]),
        "-",
    ]
    rows = [
        [
            "prunable weights that are zero",
            "counted in the files",
            f"{100 * report['achieved']['sparsity']:.4f} %",
            "-",
        ],
        ["weight files, MiB", "this directory", _mib(report["files"]["weights_bytes"]), "-"],
        *([] if report["files"]["packed"] else [computed]),
        *evaluation_rows(report),
    ]
    text = table(["what", "on what", "this model", "dense model"], rows)
    note = "No evaluation has been added yet: `billhook eval FOLDER --data SOURCE --against DENSE --report`."
    return text if report["evaluations"] else f"{text}\n\n{note}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in (header, ["---"] * len(header), *rows)
    )


def _made(report: Mapping[str, Any]) -> list[str]:
    asked, papers, text = report["asked"], report["papers"], report["calibration"]
    lines = [f"* Step {number}: {line}." for number, line in enumerate(report.get("steps", ()), start=1)]
    lines += [f"* Which weights: `{asked['criterion']}`{_options(asked['criterion_options'])}. {papers['criterion']}."]
    lines.append(
        f"* How many in each layer: `{asked['allocator']}`{_options(asked['allocator_options'])}. "
        f"{papers['allocator'] or 'Own plan'}."
    )
    lines.append(
        f"* Weights compete within a {asked['group']}; pattern {asked['pattern']}; target "
        f"{100 * asked['sparsity']:g} %."
    )
    if text:
        lines.append(
            f"* Calibration: {text['samples']} windows of {text['length']} tokens of {text['source']} "
            f"({text['sampling']}), "
            f"seed {asked['seed']}."
        )
    else:
        lines.append("* Calibration: none was needed.")
    lines.append("* Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".")
    return lines


def _options(options: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""


def _limits(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "* Pruned without training afterwards: expect it to be worse than the dense model, most of all on rare "
        "knowledge and long answers."
    ]
    if report["calibration"]:
        lines.append(
            "* The choice of weights rests on the calibration text; other languages and subjects may have lost more."
        )
    lines.append("* Fine-tuning it as it is fills the zeros again.")
    lines += [f"* {warning}" for warning in report["warnings"][:20]]
    rest = len(report["warnings"]) - 20
    return [*lines, f"* {rest} more notes are in {PAGE}."] if rest > 0 else lines
