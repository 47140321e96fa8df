"""report.html: one file with everything in it, made from report.json and the template beside this module."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.densities import density
from billhook.plan.metrics import fact
from billhook.reports.card import evaluation_rows
from billhook.reports.charts import STYLE, Axis, Series, chart
from billhook.reports.report import pattern_in_words

_DEPTH = Axis("block, from the input (0)", whole=True)


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("billhook.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def page(report: Mapping[str, Any]) -> str:
    """The text of report.html."""
    metrics = list(report["layers"][0]["metrics"])
    text: str = _template().render(
        report=report,
        style=STYLE,
        figures=list(figures(report)),
        quality=evaluation_rows(report),
        asked=_asked(report),
        provenance=_provenance(report),
        speed=_speed(report["speed"] or {}),
        metrics=metrics,
        pattern=pattern_in_words(report["asked"]["pattern"]),
        headline=_headline(report),
    )
    return text + "\n"


def _headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that people look for first."""
    files = report["files"]
    found = [("weights removed", f"{100 * report['achieved']['sparsity']:.2f} %")]
    scored = next((entry for entry in report["evaluations"] if entry.get("token_ppl") is not None), None)
    if scored is not None:
        dense = (scored.get("against") or {}).get("token_ppl")
        found.append(
            ("token perplexity", f"{scored['token_ppl']:.2f}" + ("" if dense is None else f" (dense {dense:.2f})"))
        )
    if scored is not None and scored.get("against"):
        found.append(("same next token as dense", f"{100 * scored['against']['top1_agreement']:.1f} %"))
    task = next((task for entry in report["evaluations"] for task in entry.get("tasks", [])), None)
    if task is not None:
        found.append((f"accuracy, {task['task']}", f"{100 * task['acc']:.1f} %"))
    found.append(("packed weight files" if files["packed"] else "weight files", _size(files["weights_bytes"])))
    return found if files["packed"] else [*found, ("packed (computed)", _size(files["packed_bytes_estimate"]))]


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"


def _asked(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was asked for, and what came of it."""
    asked, achieved = report["asked"], report["achieved"]
    return [
        (
            "sparsity",
            f"{100 * asked['sparsity']:g} %",
            f"{100 * achieved['sparsity']:.4f} % ({achieved['zeros']:,} of {achieved['weights']:,})",
        ),
        ("pattern", asked["pattern"], pattern_in_words(asked["pattern"])),
        ("layers", _listed(asked["targets"]) or "all prunable ones", f"{achieved['layers']}"),
        ("left alone", _listed(asked["ignore"]) or "none", "embeddings, norms and the head are never pruned"),
        ("which weights", asked["criterion"], _options(asked["criterion_options"]) or "no options"),
        ("how many in each layer", asked["allocator"], _options(asked["allocator_options"]) or "no options"),
        ("weights compete within a", asked["group"], f"rounding {asked['rounding']}"),
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, asked = report["model"], report["asked"]
    rows = [("model", f"{model['name']} ({model['type']})"), ("its digest", model["digest"] or "in memory, unknown")]
    rows += [(f"step {number}", line) for number, line in enumerate(report.get("steps", ()), start=1)]
    text = report["calibration"]
    if text:
        rows += [(f"calibration {key}", str(value)) for key, value in text.items()]
    else:
        rows.append(("calibration", "none was needed"))
    if report["gradients"]:
        rows.append(("gradients", str(report["gradients"]["statistic"])))
    rows += [(f"paper of the {key}", value or "none") for key, value in report["papers"].items()]
    rows += [("seed", str(asked["seed"])), ("type computed in", asked["dtype"]), ("device", asked["device"])]
    return [*rows, ("billhook", report["made_with"]), *report["versions"].items()]


def _speed(speed: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a benchmark: model, batch, prompt, tokens a second reading and making, each with how many times as fast
    as dense."""
    try:
        return [_cell(model, cell) for model in speed.get("models", []) for cell in model["cells"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BillhookError(f"The benchmark result is not that of billhook bench --json ({error!r}).") from None


def _cell(model: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    pairs = [(cell[key], cell.get(f"{key}_speedup")) for key in ("prefill", "decode")]
    shown = [f"{a['median']:,.1f}" + ("" if b is None else f" ({b['median']:.2f} x)") for a, b in pairs]
    return [
        model["name"],
        str(cell["batch"]),
        str(cell["prompt"]),
        *shown,
        _size(model["file_bytes"]),
        _size(model["memory_bytes"]),
    ]


def figures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pictures with their captions and numbers."""
    blocks, layers = report["blocks"], report["layers"]
    found = [_sparsity(blocks), _by_kind(layers)]
    for name in layers[0]["metrics"]:
        what = fact(name).summary if _known(name) else name
        values = [row["metrics"].get(name) for row in layers]
        found.append(
            _lines(
                f"{name} by depth",
                f"What the allocator read: {what.replace(chr(96), chr(39))}.",
                layers,
                values,
                Axis(name),
            )
        )
    found += _spectra(report.get("spectra") or {"metrics": {}, "quantiles": {}}, layers)
    if any(row["error"] for row in layers):
        caption = (
            "The squared change of each layer's output as a share of its square, by the sizes of its inputs alone."
        )
        found.append(
            _lines(
                "Error by block, layer by layer",
                caption,
                layers,
                [row["error"] for row in layers],
                Axis("share lost", log=True),
            )
        )
    for entry in report["evaluations"]:
        errors = (entry.get("against") or {}).get("error_by_block")
        if errors:
            found.append(_measured(errors, entry))
            break
    return found


def _spectra(spectra: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Columns of a table that the allocator did not read, by depth, and the spectral densities of a few layers."""
    found = []
    for name, values in spectra["metrics"].items():
        if name not in layers[0]["metrics"]:
            caption = f"Measured in the dense model: {fact(name).summary if _known(name) else name}."
            found.append(
                _lines(f"{name} by depth", caption, layers, [values.get(row["layer"]) for row in layers], Axis(name))
            )
    quantiles = spectra["quantiles"]
    drawn = {layer: density(values) for layer, values in quantiles.items()}
    if any(middles for middles, _ in drawn.values()):
        found.append(_densities(drawn, _exponents(spectra, layers)))
    return found


def _exponents(spectra: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Layer -> its first known exponent, in words."""
    known = {row["layer"]: row["metrics"] for row in layers}
    for name, values in spectra["metrics"].items():
        for layer, value in values.items():
            known[layer] = {**known.get(layer, {}), name: value}
    first = {
        layer: next(((n, v) for n, v in values.items() if n.startswith("alpha")), None)
        for layer, values in known.items()
    }
    return {layer: f"{pair[0]} {pair[1]:.2f}" for layer, pair in first.items() if pair}


def _densities(drawn: Mapping[str, tuple[list[float], list[float]]], exponents: Mapping[str, str]) -> dict[str, Any]:
    title = "Spectral density of a few layers"
    caption = (
        "How the eigenvalues of WᵀW of the dense weights are spread: the share of them per unit. A tail that "
        "falls slowly (a small "
        "exponent alpha) marks a well-trained layer. Shown are the layers with the smallest, middle and largest "
        "value of what was measured."
    )
    names = {layer: f"{layer} ({exponents[layer]})" if layer in exponents else layer for layer in drawn}
    series = [Series(names[layer], middles, heights) for layer, (middles, heights) in drawn.items()]
    svg = chart(title, series, Axis("eigenvalue of WᵀW", log=True), Axis("density", log=True), summary=caption)
    rows = [[names[layer], _short(a), _short(b)] for layer, pairs in drawn.items() for a, b in zip(*pairs, strict=True)]
    return {"title": title, "caption": caption, "svg": svg, "header": ["layer", "eigenvalue", "density"], "rows": rows}


def _known(name: str) -> bool:
    try:
        fact(name)
    except BillhookError:
        return False
    return True


def _sparsity(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    x = [row["block"] for row in blocks]
    series = [
        Series(
            "achieved",
            x,
            [100 * r["sparsity"] for r in blocks],
            [100 * r["least"] for r in blocks],
            [100 * r["most"] for r in blocks],
        ),
        Series("planned", x, [100 * r["planned"] for r in blocks], dashed=True, marks=False),
    ]
    title, caption = (
        "Sparsity by depth, plan against achieved",
        "Shaded: from the least to the most pruned layer of a block.",
    )
    rows = [
        [str(r["block"]), *(f"{100 * r[key]:.2f}" for key in ("planned", "sparsity", "least", "most"))] for r in blocks
    ]
    svg = chart(title, series, _DEPTH, Axis("weights removed (%)"), summary=caption)
    return {
        "title": title,
        "caption": caption,
        "svg": svg,
        "header": ["block", "planned %", "achieved %", "least %", "most %"],
        "rows": rows,
    }


def _by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    caption = "One line for each kind of layer; where a block has several of a kind, their mean."
    return _lines(
        "Sparsity by kind of layer",
        caption,
        layers,
        [100 * row["sparsity"] for row in layers],
        Axis("weights removed (%)"),
    )


def _lines(
    title: str, caption: str, layers: Sequence[Mapping[str, Any]], values: Sequence[float | None], axis: Axis
) -> dict[str, Any]:
    """A line for each kind of layer over depth, with its numbers."""
    kinds = list(dict.fromkeys(row["kind"] for row in layers))
    depths = sorted({row["block"] for row in layers})
    at: dict[tuple[str, int], list[float | None]] = {}
    for row, value in zip(layers, values, strict=True):
        at.setdefault((row["kind"], row["block"]), []).append(value)
    means = {kind: [_mean(at.get((kind, block), [])) for block in depths] for kind in kinds}
    # lines on top of each other, as block by block allocators make them, would look like one of them
    alike = all(_same(means[kind], means[kinds[0]]) for kind in kinds)
    series = (
        [Series("every kind", depths, means[kinds[0]])]
        if alike
        else [Series(kind, depths, means[kind]) for kind in kinds]
    )
    rows = [[str(block), *(_short(means[kind][i]) for kind in kinds)] for i, block in enumerate(depths)]
    return {
        "title": title,
        "caption": caption,
        "svg": chart(title, series, _DEPTH, axis, summary=caption),
        "header": ["block", *kinds],
        "rows": rows,
    }


def _measured(errors: Sequence[float], entry: Mapping[str, Any]) -> dict[str, Any]:
    title = "Error of each block's output against the dense model"
    caption = (
        f"Squared difference over the dense square, measured on windows of {entry['source']}: errors of early blocks "
        "are carried on."
    )
    svg = chart(
        title,
        [Series("this model", range(len(errors)), errors)],
        _DEPTH,
        Axis("relative squared error", log=True),
        summary=caption,
    )
    rows = [[str(block), _short(error)] for block, error in enumerate(errors)]
    return {"title": title, "caption": caption, "svg": svg, "header": ["block", "error"], "rows": rows}


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _same(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    """Whether two lines could not be told apart: within a thousandth, which leaves room for whole numbers of
    weights."""
    pairs = zip(a, b, strict=True)
    return all(
        x == y or (x is not None and y is not None and abs(x - y) <= 1e-3 * max(abs(x), abs(y))) for x, y in pairs
    )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
