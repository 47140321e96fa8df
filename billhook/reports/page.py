"""report.html: one self-contained file, made from report.json and the template templates/report.html.j2."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.errors import BillhookError
from billhook.evaluation.scoring import measured, recorded_divergence
from billhook.plan.densities import density
from billhook.plan.metrics import fact
from billhook.reports.card import evaluation_rows, lost_in_words, options_text, template
from billhook.reports.charts import STYLE, Series, chart
from billhook.reports.heat_maps import by_kind, heat_map
from billhook.reports.pictures import BLOCK, ERROR, SPARSITY
from billhook.reports.report import pattern_in_words
from billhook.reports.scales import Axis

_DEPTH = Axis(BLOCK, whole=True)
Rows = Sequence[Mapping[str, Any]]
EQUAL = 1e-3  # sparsities that differ by less are equal on a picture


@dataclass(frozen=True)
class Figure:
    """A picture with its caption and the numbers in it."""

    title: str
    caption: str
    svg: str
    header: list[str]
    rows: list[list[str]]


def page(report: Mapping[str, Any]) -> str:
    """The text of report.html."""
    speed = _speed(report["speed"] or {})
    text: str = template("report.html.j2", html=True).render(
        report=report,
        style=STYLE,
        figures=figures(report),
        even=even(report),
        quality=evaluation_rows(report),
        asked=_asked(report),
        provenance=_provenance(report),
        speed_header=speed[0],
        speed=speed[1],
        metrics=list(report["layers"][0]["metrics"]),
        pattern=pattern_in_words(report["asked"]["pattern"]),
        headline=_headline(report),
        lost=lost_in_words(report),
    )
    return text + "\n"


def _headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The most important numbers."""
    files = report["files"]
    found = []
    if lost := report.get("lost"):
        far = recorded_divergence(lost)
        value = "not finite" if far is None else f"{far:.3f}"
        found = [("quality against dense", lost["verdict"]), (measured(lost.get("unit", "token")), value)]
    found.append(("sparsity", f"{100 * report['achieved']['sparsity']:.2f} %"))
    scored = next((entry for entry in report["evaluations"] if entry.get("token_ppl") is not None), None)
    if scored is not None:
        against = scored.get("against") or {}
        dense = f" (dense {against['token_ppl']:.2f})" if against.get("token_ppl") is not None else ""
        found.append(("token perplexity", f"{scored['token_ppl']:.2f}{dense}"))
        if against:
            found.append(("top-1 agreement with dense", f"{100 * against['top1_agreement']:.1f} %"))
    task = next((task for entry in report["evaluations"] for task in entry.get("tasks", [])), None)
    if task is not None:
        found.append((f"accuracy, {task['task']}", f"{100 * task['acc']:.1f} %"))
    found.append(("packed weight files" if files["packed"] else "weight files", _size(files["weights_bytes"])))
    return found if files["packed"] else [*found, ("packed (estimate)", _size(files["packed_bytes_estimate"]))]


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"


def _asked(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table of the request: what, as requested, and the result."""
    asked, achieved = report["asked"], report["achieved"]
    counts = f"{100 * achieved['sparsity']:.4f} % ({achieved['zeros']:,} of {achieved['weights']:,})"
    return [
        ("sparsity", f"{100 * asked['sparsity']:g} %", counts),
        ("pattern", asked["pattern"], pattern_in_words(asked["pattern"])),
        ("layers", ", ".join(asked["targets"]) or "all prunable layers", f"{achieved['layers']}"),
        ("ignored layers", ", ".join(asked["ignore"]) or "none", "embeddings, norms and the head are never pruned"),
        ("recipe", asked.get("recipe") or "none", "criterion and allocation are below"),
        ("criterion", asked["criterion"], options_text(asked["criterion_options"]) or "no options"),
        ("allocation", asked["allocator"], options_text(asked["allocator_options"]) or "no options"),
        ("comparison group", asked["group"], "counts as published" if asked["published"] else "exact counts"),
    ]


def _provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, asked = report["model"], report["asked"]
    rows = [("model", f"{model['name']} ({model['type']})"), ("digest", model["digest"] or "in memory, unknown")]
    rows += [(f"step {number}", line) for number, line in enumerate(report.get("steps", ()), start=1)]
    if text := report["calibration"]:
        rows += [(f"calibration {key}", str(value)) for key, value in text.items()]
    else:
        rows.append(("calibration", "not needed"))
    if report["gradients"]:
        rows.append(("gradients", str(report["gradients"]["statistic"])))
    rows += [(f"paper of the {key}", value or "none") for key, value in report["papers"].items()]
    rows += [("seed", str(asked["seed"])), ("compute dtype", asked["dtype"]), ("device", asked["device"])]
    return [*rows, ("billhook", report["made_with"]), *report["versions"].items()]


def _speed(speed: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a benchmark: model, batch, prompt, speed of reading and of decoding (with speedup), bytes.

    Images have no prompt, and models that generate nothing no speed of decoding.
    """
    try:
        cells = [(model, cell) for model in speed.get("models", []) for cell in model["cells"]]
        prompts, decode = (any(cell[key] is not None for _, cell in cells) for key in ("prompt", "decode"))
        kinds = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s"}
        if not decode:
            kinds = {"prefill": "tokens/s" if prompts else "images/s"}
        rows = [_speed_row(model, cell, prompts, list(kinds)) for model, cell in cells]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BillhookError(f"The benchmark result is not that of billhook bench --json ({error!r}).") from None
    prompt = ["prompt, tokens"] if prompts else []
    return ["batch", *prompt, *kinds.values(), "weight files", "peak memory"], rows


def _speed_row(model: Mapping[str, Any], cell: Mapping[str, Any], prompt: bool, kinds: Sequence[str]) -> list[str]:
    pairs = [(cell[key], cell.get(f"{key}_speedup")) for key in kinds]
    shown = [f"{a['median']:,.1f}" + ("" if b is None else f" ({b['median']:.2f} x)") for a, b in pairs]
    sizes = [_size(model[key]) for key in ("file_bytes", "memory_bytes")]
    return [model["name"], str(cell["batch"]), *([str(cell["prompt"])] if prompt else []), *shown, *sizes]


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """All pictures of the page: of numbers that are not the same everywhere."""
    layers, spectra = report["layers"], report.get("spectra") or {"metrics": {}, "quantiles": {}}
    sparsities = [100 * row["sparsity"] for row in layers]
    caption = "Achieved sparsity by kind of layer and block; the mean where a block has several layers of a kind."
    found = []
    if not even(report):
        found = [_by_block(report["blocks"]), _by_layer("Sparsity by layer", caption, layers, sparsities, SPARSITY)]
    for name in layers[0]["metrics"]:
        values = [row["metrics"].get(name) for row in layers]
        caption = f"Metric used for the allocation: {_meaning(name)}."
        found.append(_by_layer(f"{name} by layer", caption, layers, values, Axis(name)))
    for name in [name for name in spectra["metrics"] if name not in layers[0]["metrics"]]:
        values = [spectra["metrics"][name].get(row["layer"]) for row in layers]
        caption = f"Measured in the dense model: {_meaning(name)}."
        found.append(_by_layer(f"{name} by layer", caption, layers, values, Axis(name)))
    drawn = {layer: density(quantiles) for layer, quantiles in spectra["quantiles"].items()}
    if any(middles for middles, _ in drawn.values()):
        found.append(_densities(drawn, _exponents(spectra, layers)))
    if any(row["error"] for row in layers):
        caption = "Relative squared change of the layer's output, estimated while pruning from input norms alone."
        errors = [row["error"] for row in layers]
        found.append(_by_layer("Output error by layer", caption, layers, errors, ERROR))
    measured = [entry for entry in report["evaluations"] if (entry.get("against") or {}).get("error_by_block")]
    return [*found, *map(_measured, measured[:1])]


def even(report: Mapping[str, Any]) -> bool:
    """Whether all layers have the same sparsity, planned and achieved, up to a weight."""
    of = [row[key] for row in report["layers"] for key in ("sparsity", "planned")]
    return max(of) - min(of) < EQUAL


def _by_block(blocks: Rows) -> Figure:
    """The sparsity by depth; the plan is drawn beside it where they differ."""
    title, caption = "Sparsity by block", "Achieved, as planned; shaded: the range over the layers of a block."
    keys, x = ("planned", "sparsity", "least", "most"), [row["block"] for row in blocks]
    planned, achieved, least, most = ([100 * row[key] for row in blocks] for key in keys)
    series = [Series("achieved", x, achieved, least, most)]
    if any(abs(row["planned"] - row["sparsity"]) > EQUAL for row in blocks):
        caption = caption.replace("Achieved, as planned", "Planned and achieved")
        series.append(Series("planned", x, planned, colour=-1, dash=1, marks=False))
    rows = [[str(row["block"]), *(f"{100 * row[key]:.2f}" for key in keys)] for row in blocks]
    svg = chart(title, series, _DEPTH, SPARSITY, summary=caption)
    return Figure(title, caption, svg, ["block", "planned %", "achieved %", "lowest %", "highest %"], rows)


def _by_layer(title: str, caption: str, layers: Rows, values: Sequence[float | None], axis: Axis) -> Figure:
    """A heat map over kind of layer and block."""
    kinds, blocks, cells = by_kind([row["kind"] for row in layers], [row["block"] for row in layers], values)
    svg = heat_map(title, kinds, blocks, cells, axis, x=BLOCK, summary=caption)
    rows = [[str(block), *map(_short, column)] for block, column in zip(blocks, zip(*cells, strict=True), strict=True)]
    return Figure(title, caption, svg, ["block", *kinds], rows)


def _densities(drawn: Mapping[str, tuple[list[float], list[float]]], exponents: Mapping[str, str]) -> Figure:
    title = "Spectral density of a few layers"
    caption = (
        "Density of the eigenvalues of WᵀW of the dense weights. A heavy tail (a small exponent alpha) marks a "
        "well-trained layer. Shown are the layers with the smallest, median and largest exponent."
    )
    names = {layer: f"{layer} ({exponents[layer]})" if layer in exponents else layer for layer in drawn}
    series = [Series(names[layer], middles, heights) for layer, (middles, heights) in drawn.items()]
    svg = chart(title, series, Axis("eigenvalue of WᵀW", log=True), Axis("density", log=True), summary=caption)
    rows = [[names[layer], _short(a), _short(b)] for layer, pairs in drawn.items() for a, b in zip(*pairs, strict=True)]
    return Figure(title, caption, svg, ["layer", "eigenvalue", "density"], rows)


def _exponents(spectra: Mapping[str, Any], layers: Rows) -> dict[str, str]:
    """Layer -> name and value of its first exponent."""
    found: dict[str, str] = {}
    for row in layers:
        measured = {name: values[row["layer"]] for name, values in spectra["metrics"].items() if row["layer"] in values}
        for name, value in (row["metrics"] | measured).items():
            if name.startswith("alpha"):
                found.setdefault(row["layer"], f"{name} {value:.2f}")
    return found


def _measured(entry: Mapping[str, Any]) -> Figure:
    errors, title = entry["against"]["error_by_block"], "Error of each block's output"
    caption = (
        f"Relative squared difference from the dense model's output on windows of {entry['source']}, which includes "
        "the errors of earlier blocks."
    )
    svg = chart(title, [Series("this model", range(len(errors)), errors)], _DEPTH, ERROR, summary=caption)
    rows = [[str(block), _short(error)] for block, error in enumerate(errors)]
    return Figure(title, caption, svg, ["block", "error"], rows)


def _meaning(metric: str) -> str:
    """The summary of a metric, or its name where this version does not know it."""
    try:
        return fact(metric).summary.replace("`", "'")
    except BillhookError:
        return metric


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
