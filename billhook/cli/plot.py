"""`billhook plot`: pictures of a table, plans, a layer's spectrum, and masks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.cli.common import Json, emit, handle_errors, say

NAME = "plot"
EXAMPLES = """\b
Examples:
  billhook plot table.json -o pictures
  billhook plot table.json --plan uniform.json --plan alphapruning.json -o pictures
  billhook plot --model ./model model.layers.0.mlp.down_proj -o pictures
  billhook plot --mask ./wanda --mask ./magnitude model.layers.0.self_attn.q_proj -o pictures
"""


@handle_errors
def command(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="[TABLE|LAYER]",
            help="A table.json from billhook measure; with --mask or --model, a layer's full name.",
        ),
    ] = None,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the pictures, each as SVG and PNG.")
    ] = Path("pictures"),
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="A column of the table; by default its first, and error curves. Repeatable.",
            metavar="NAME",
        ),
    ] = None,
    plans: Annotated[
        list[Path] | None,
        typer.Option("--plan", help="A plan.json for the same layers, named by its file. Repeatable.", metavar="PLAN"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model directory, or a name on the hub: draw the spectrum of --layer.")
    ] = None,
    masks: Annotated[
        list[Path] | None,
        typer.Option("--mask", help="A pruned directory: draw what is left of --layer. Repeatable.", metavar="DIR"),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option("--layer", help="Full name of a layer. Repeatable.", metavar="NAME")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw tables, plans, spectra and masks; needs matplotlib: pip install 'billhook[plots]'."""
    from billhook.errors import BillhookError

    pictures: dict[str, Any] = {}
    table_file, layers = _subject(subject, layers or [], drawn=model is not None or bool(masks))
    if plans and table_file is None:
        raise BillhookError("Plans are drawn over depth: give the TABLE that they were made from, too.")
    if table_file is None and model is None and not masks:
        raise BillhookError("Say what to draw: a TABLE, --model MODEL LAYER, or --mask DIR LAYER.")
    if (model is not None or masks) and not layers:
        raise BillhookError(
            "Say which LAYER, such as model.layers.0.mlp.down_proj (billhook prune --dry-run lists them)."
        )
    if table_file is not None:
        pictures |= _tables(table_file, metrics or [], plans or [])
    for name in layers:
        if model is not None:
            pictures[f"spectrum-{name}"] = _spectrum(model, name)
        if masks:
            pictures[f"mask-{name}"] = _masks(masks, name)
    from billhook.reports.plots import save

    written = [path for stem, figure in pictures.items() for path in save(figure, output, stem)]
    say(f"{output}: " + ", ".join(path.name for path in written if path.suffix == ".png") + " (and as SVG).")
    if as_json:
        emit({"output": str(output), "pictures": [str(path) for path in written]})


def _subject(subject: str | None, layers: list[str], drawn: bool) -> tuple[Path | None, list[str]]:
    """The table and the layers to draw: where layers are `drawn`, a subject that is no file is one of them."""
    if subject is None:
        return None, layers
    if drawn and not Path(subject).exists():
        return None, list(dict.fromkeys([subject, *layers]))
    return Path(subject), layers


def _tables(table_file: Path, metrics: list[str], plans: list[Path]) -> dict[str, Any]:
    from billhook.errors import BillhookError
    from billhook.plan.metrics import fact
    from billhook.plan.plan import load_plan
    from billhook.plan.table import Table
    from billhook.reports.curves_picture import error_curves
    from billhook.reports.plots import metric_against_sparsity, metric_by_depth, sparsity_by_depth

    table = Table.load(table_file)
    curves = [name for name in metrics or table.rows[0].curves if fact(name).name == "error_curve"]
    chosen = [name for name in metrics or table.columns()[:1] if name not in curves]
    if not chosen and not curves and not plans:
        raise BillhookError(
            f"{table_file} has no columns to draw: measure one with billhook measure, or give a --plan."
        )
    named = {path.stem: load_plan(path) for path in plans}
    if len(named) < len(plans):
        raise BillhookError(
            "Two plans have the same file name, by which they are told apart in the picture: rename one."
        )
    pictures = {f"{metric}-by-depth": metric_by_depth(table, metric) for metric in chosen}
    for curve in curves:
        pictures |= {f"{curve}-{name}": error_curves(table, curve, plan) for name, plan in named.items()} or {
            curve: error_curves(table, curve)
        }
    if named:
        pictures |= {f"{metric}-against-sparsity": metric_against_sparsity(table, metric, named) for metric in chosen}
        pictures["sparsity-by-depth"] = sparsity_by_depth(table, named)
    return pictures


def _weight(directory: str | Path, name: str) -> Any:
    """The weight [out, in] of one layer of a model on disk or on the hub."""
    from billhook.architectures.layers import find_layers
    from billhook.errors import BillhookError
    from billhook.registry import hint
    from billhook.store.checkpoint import resolve
    from billhook.tasks.opening import load_model

    weights = {layer.name: layer for layer in find_layers(load_model(resolve(directory)))}
    if name not in weights:
        raise BillhookError(f"{directory} has no prunable layer {name!r}.{hint(name, weights)}")
    return weights[name].weight


def _spectrum(model: str, name: str) -> Any:
    from billhook.measurement.eigen import eigenvalues
    from billhook.measurement.tails import Spectrum
    from billhook.reports.plots import spectral_density

    spectrum = Spectrum(eigenvalues(_weight(model, name)))
    return spectral_density(
        name, spectrum.positive.tolist(), {"alpha_peak": spectrum.fit("peak"), "alpha_mid": spectrum.fit("mid")}
    )


def _masks(directories: list[Path], name: str) -> Any:
    from billhook.errors import BillhookError
    from billhook.reports.plots import kept_weights

    kept = {path.name or str(path): (_weight(path, name) != 0).numpy() for path in directories}
    if len(kept) < len(directories):
        raise BillhookError(
            "Two directories have the same name, by which they are told apart in the picture: rename one."
        )
    return kept_weights(name, kept)
