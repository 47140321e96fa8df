"""The model card: README.md with the metadata that the Hugging Face hub reads, made from report.json.

The text is that of the template templates/card.md.j2. It names no local path: of a file, its name and digest.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from billhook.evaluation.quality import DISTANCE_SCALE, SCALE, Loss
from billhook.evaluation.scoring import each
from billhook.store.layout import PAGE

_CLASSES = {  # of transformers: the model's and its reader's, by task
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer"),
    "fill-mask": ("AutoModelForMaskedLM", "AutoTokenizer"),
    "image-text-to-text": ("AutoModelForImageTextToText", "AutoProcessor"),
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor"),
    "feature-extraction": ("AutoModel", "AutoTokenizer"),
    "image-feature-extraction": ("AutoModel", "AutoImageProcessor"),
    "text2text-generation": ("AutoModelForSeq2SeqLM", "AutoTokenizer"),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoProcessor"),
}


@cache
def template(name: str, *, html: bool) -> Any:
    """A template of the folder templates."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = PackageLoader("billhook.reports")
    environment = Environment(
        loader=folder, autoescape=html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def card(report: Mapping[str, Any]) -> str:
    """The text of README.md."""
    model, achieved, source = report["model"], report["achieved"], report["metadata"]
    named = f"[{model['name']}](https://huggingface.co/{model['name']})" if "/" in model["name"] else model["name"]
    zeros = f"{achieved['zeros']:,} of {achieved['weights']:,} prunable weights ({100 * achieved['sparsity']:.2f} %)"
    auto_class, reader = _CLASSES[source.get("pipeline_tag", "text-generation")]
    text: str = template("card.md.j2", html=False).render(
        metadata=_metadata(report),
        title=f"{model['name']}, {100 * achieved['sparsity']:.3g} % sparse",
        what=f"This is {named} ({model['type']}) with {zeros} set to zero.",
        smaller=any(line.startswith("slim:") for line in report["steps"]),
        lost=lost_in_words(report),
        asked=report["asked"],
        pattern=report["asked"]["pattern"],
        page=PAGE,
        packed=report["files"]["packed"],
        auto_class=auto_class,
        reader=reader,
        license=source.get("license_name") or source.get("license"),
        numbers=_numbers(report),
        evaluated=bool(report["evaluations"]),
        limitations=list(_limitations(report)),
        method=_method(report),
        made_with=report["made_with"],
    )
    return text.rstrip("\n") + "\n"


def lost_in_words(report: Mapping[str, Any]) -> str:
    """What was lost against the dense model, what the verdict means, and the next recipe."""
    if report.get("lost") is None:
        return "What was lost against the dense model was not measured when the model was pruned."
    better = report.get("better_recipe")
    more = f" The recipe {better} loses less." if better else ""
    lost = Loss(**report["lost"])
    scale = f"The verdict is that of the KL divergence in nats {each(lost.unit)}: {SCALE}."
    if lost.cosine is not None:
        scale = f"The verdict is that of 1 - cosine: {DISTANCE_SCALE}."
    return f"Quality: {lost}.{before_last([line.partition(':')[0] for line in report['steps']])} {scale}{more}"


def before_last(steps: Sequence[str]) -> str:
    """What is said of the loss of the last of several steps, which is that against the model before it; a training has
    the original as teacher."""
    if len(steps) == 1 or steps[-1] == "recover":
        return ""
    return f" The dense model there is the one before the last of {len(steps)} steps: {', '.join(steps)}."


def _metadata(report: Mapping[str, Any]) -> str:
    """The metadata as YAML: what the source's card says about licence, language and kind, and what was done."""
    import yaml

    name, asked, source = report["model"]["name"], report["asked"], report["metadata"]
    source = {**source, "pipeline_tag": source.get("pipeline_tag", "text-generation")}
    tags = ["billhook", "pruned", "sparse", asked["criterion"], asked["allocator"].replace(" ", "-")]
    found = hub_metadata(source, name, tags, library="billhook" if report["files"]["packed"] else "transformers")
    if results := [_result(found["pipeline_tag"], *entry) for entry in _entries(report)]:
        found["model-index"] = [{"name": f"{name.rpartition('/')[2]}-pruned", "results": results}]
    text: str = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    return text


def hub_metadata(
    source: Mapping[str, Any], name: str, tags: Sequence[str], *, library: str, relation: str = "finetune"
) -> dict[str, Any]:
    """The metadata of a model's card: what the card of its `source` says, the model called `name` (or what that one was
    made from) as its base, the library that reads it, and more tags."""
    found = dict(source)
    if base := name if "/" in name else found.pop("base_model", None):
        found |= {"base_model": base, "base_model_relation": relation}
    return found | {"library_name": library, "tags": list(dict.fromkeys([*source.get("tags", []), *tags]))}


def _entries(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Data, name of the measure, its kind, and the value, of every evaluation."""
    for record in report["evaluations"]:
        word = record.get("word") or {}
        if record.get("token_ppl") is not None:
            yield record["source"], "Token perplexity (non-overlapping windows)", "perplexity", record["token_ppl"]
        if word.get("word_ppl") is not None:
            yield word["source"], "Word perplexity (lm-evaluation-harness)", "perplexity", word["word_ppl"]
        for key, label in (("top1", "Top-1 accuracy"), ("exact_match", "Exact match")):
            if key in record:
                yield record["source"], label, "accuracy" if key == "top1" else key, record[key]
        for task in record.get("tasks", []):
            yield task["task"], "Accuracy", "accuracy", task["acc"]


def _result(task: str, data: str, label: str, kind: str, value: float) -> dict[str, Any]:
    """An entry of the hub's `model-index`."""
    dataset = {"name": data, "type": data}
    metrics = [{"name": label, "type": kind, "value": float(f"{value:.6g}")}]
    return {"task": {"type": task}, "dataset": dataset, "metrics": metrics}


def evaluation_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The evaluations: measure with its protocol, data, this model, dense model."""
    rows = []
    for record in report["evaluations"]:
        dense = record.get("against") or {}
        dense_ppl = "-" if dense.get("token_ppl") is None else f"{dense['token_ppl']:.4f}"
        begun = ", each after BOS" if record.get("bos") else ""
        windows = f"{record.get('windows')} windows of {record.get('length')}{begun}"
        if "inputs" in record:
            rows += _rows_of_inputs(record, dense)
            continue
        where = f"{record['source']}, {windows}" if "nll" in record else ""
        if where:
            label = "token perplexity, non-overlapping windows (lower is better)"
            rows.append([label, where, f"{record['token_ppl']:.4f}", dense_ppl])
        if dense:
            top1 = f"{100 * dense['top1_agreement']:.2f} %"
            rows.append(["KL divergence from the dense model, nats a token", where, f"{dense['kl']:.4f}", "0"])
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


def _rows_of_inputs(record: Mapping[str, Any], dense: Mapping[str, Any]) -> list[list[str]]:
    """The rows of an evaluation on images or other inputs."""
    where, rows = f"{record['source']}, {record['inputs']} {record['unit']}s", []
    for key, label in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy"), ("exact_match", "exact match")):
        if key in record:
            value = f"{100 * record[key]:.2f} ± {100 * record[f'{key}_error']:.2f} %"
            rows.append([label, where, value, f"{100 * dense[key]:.2f} %" if key in dense else "-"])
    if "kl" in dense:
        rows.append(
            [f"KL divergence from the dense model, nats {each(record['unit'])}", where, f"{dense['kl']:.4f}", "0"]
        )
        agreed = f"{100 * dense['top1_agreement']:.2f} %"
        rows.append(["top-1 agreement with the dense model", where, agreed, "100 %"])
    if "cosine" in dense:
        rows.append(["cosine to the dense model's embeddings", where, f"{dense['cosine']:.4f}", "1"])
    return rows


def _numbers(report: Mapping[str, Any]) -> str:
    achieved, files = report["achieved"], report["files"]
    rows = [["sparsity of the prunable weights", "counted in the files", f"{100 * achieved['sparsity']:.4f} %", "-"]]
    rows.append(["weight files, MiB", "this directory", _mib(files["weights_bytes"]), "-"])
    if not files["packed"]:
        rows.append(["weight files when packed, MiB", "estimate", _mib(files["packed_bytes_estimate"]), "-"])
    return table(["measure", "on", "this model", "dense model"], [*rows, *evaluation_rows(report)])


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _method(report: Mapping[str, Any]) -> list[str]:
    asked, papers, text = report["asked"], report["papers"], report["calibration"]
    lines = [f"Step {number}: {line}." for number, line in enumerate(report.get("steps", ()), start=1)]
    for key, paper in (("criterion", papers["criterion"]), ("allocator", papers["allocator"] or "Given by the user")):
        options = options_text(asked[f"{key}_options"])
        name = "Criterion" if key == "criterion" else "Allocation"
        lines.append(f"{name}: `{asked[key]}`{f' ({options})' if options else ''}. {paper}.")
    target = f"{100 * asked['sparsity']:g} %; pattern: {asked['pattern']}; comparison group: {asked['group']}"
    calibration = "not needed"
    if text:
        begun = ", each window after BOS" if text.get("bos") else ""
        sampling = f"{text['sampling']} sampling{begun}, seed {asked['seed']}, SHA-256 {text['digest'][:16]}"
        pixels = " x ".join(map(str, text.get("pixels", ())))
        what = f"windows of {text['length']} tokens" if "length" in text else f"images of {pixels} pixels"
        what = "recordings" if "features" in text else what
        size = f"{text['samples']} {what}"
        calibration = f"{size} of {text['source']} ({sampling})"
    lines += [f"Target sparsity: {target}.", f"Calibration: {calibration}."]
    return [*lines, "Versions: " + ", ".join(f"{name} {n}" for name, n in report["versions"].items()) + "."]


def options_text(options: Mapping[str, Any]) -> str:
    """Options as `key=value, key=value`, without those that are chosen by the shape."""
    return ", ".join(f"{key}={value}" for key, value in options.items() if value is not None)


def _limitations(report: Mapping[str, Any]) -> Iterator[str]:
    yield "The model is worse than the dense one, above all in rare knowledge: evaluate it on your own task before use."
    yield "Biases and errors of the original remain, and pruning can make them larger."
    if report["calibration"]:
        if "pixels" in report["calibration"]:
            yield "Weights were chosen on the calibration images: other kinds of images may have lost more."
        else:
            yield "Weights were chosen on the calibration text: other languages and subjects may have lost more."
    yield "Ordinary fine-tuning makes the zeros nonzero again; `billhook recover` keeps them."
    yield from report["warnings"][:20]
    if (rest := len(report["warnings"]) - 20) > 0:
        yield f"{rest} more warnings are in {PAGE}."
