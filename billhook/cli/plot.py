"""`billhook plot`: pictures of a table, plans, a layer's spectrum, and masks."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.cli.common import emit, load_plans, say
from billhook.cli.options import Json, output_option

NAME = "plot"
EXAMPLES = """\b
Examples:
  billhook plot table.json -o pictures
  billhook plot table.json --plan uniform.json --plan alphapruning.json -o pictures
  billhook plot --model ./model model.layers.0.mlp.down_proj -o pictures
  billhook plot ./small -o pictures
  billhook plot --mask ./wanda --mask ./magnitude model.layers.0.self_attn.q_proj -o pictures
"""
TILES = 512  # the largest number of tiles in each direction of a mask; more cannot be seen on a screen
SUBJECT_HELP = (
    "A table.json from billhook measure, or the output of billhook compress; with --mask or --model, the full name "
    "of a layer."
)
METRIC_HELP = "A column of the table; by default its first column and its error curves. Repeatable."
PLAN_HELP = "A plan.json for the same layers, named by its file. Repeatable."


def command(
    subject: Annotated[str | None, typer.Argument(metavar="TABLE|DIR|LAYER", help=SUBJECT_HELP)] = None,
    *,
    output: Annotated[Path, output_option("Directory for the pictures (SVG).")] = Path("pictures"),
    metrics: Annotated[list[str] | None, typer.Option("--metric", help=METRIC_HELP, metavar="NAME")] = None,
    plans: Annotated[list[Path] | None, typer.Option("--plan", help=PLAN_HELP, metavar="PLAN")] = None,
    model: Annotated[str | None, typer.Option(help="Draw the spectrum of --layer of this model.")] = None,
    masks: Annotated[
        list[Path] | None,
        typer.Option("--mask", help="A pruned directory: draw the mask of --layer. Repeatable.", metavar="DIR"),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option("--layer", help="Full name of a layer. Repeatable.", metavar="NAME")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the metrics of a table and the sparsities of plans by layer, the spectrum of a layer, masks, and the
    predicted loss by size of a compressed model."""
    from billhook.errors import BillhookError
    from billhook.store.files import write_text

    table_file, layers = _subject(subject, layers or [], drawn=model is not None or bool(masks))
    if plans and table_file is None:
        raise BillhookError("A plan is drawn by depth and kind of layer: give the TABLE from which it was made, too.")
    if (plans or metrics) and table_file is not None and table_file.is_dir():
        raise BillhookError(f"--plan and --metric belong to a TABLE of billhook measure, and {table_file} is none.")
    if layers and model is None and not masks:
        raise BillhookError(f"Say of what {layers[0]} is to be drawn: --model MODEL, or --mask DIR.")
    if table_file is None and model is None and not masks:
        raise BillhookError("Say what to draw: a TABLE, --model MODEL LAYER, or --mask DIR LAYER.")
    if (model is not None or masks) and not layers:
        example = "such as model.layers.0.mlp.down_proj (billhook prune --dry-run lists them)"
        raise BillhookError(f"Say which LAYER, {example}.")
    if table_file is not None and table_file.is_dir():
        pictures = _front(table_file)
    else:
        pictures = {} if table_file is None else _tables(table_file, metrics or [], plans or [])
    pictures |= _of_layers(layers, model, masks or [])
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{re.sub(r'[^-.0-9A-Za-z_]', '_', stem)}.svg" for stem in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        write_text(path, picture)
    say(f"{output}: {', '.join(path.name for path in paths)}.")
    if as_json:
        emit({"output": str(output), "pictures": [str(path) for path in paths]})


def _front(directory: Path) -> dict[str, str]:
    """The picture of a compressed model, by file stem."""
    from billhook.evaluation.scoring import measured
    from billhook.reports.pictures import front_of
    from billhook.steps.earlier_levels import step_with_levels

    step, plan = step_with_levels(directory)
    loss = measured((step.made_by.get("lost") or {}).get("unit", "token"))
    return {"front": front_of(directory.resolve().name, plan, loss)}


def _of_layers(layers: list[str], model: str | None, masks: list[Path]) -> dict[str, str]:
    """The spectra of layers of `model`, and their masks in directories, by file stem."""
    from billhook.errors import BillhookError

    found = {f"spectrum-{name}": _spectrum(model, name) for name in layers if model is not None}
    found |= {f"mask-{name}-{d.resolve().name}": _mask(d, name) for name in layers for d in masks}
    if len(found) < len(layers) * (len(masks) + (model is not None)):
        raise BillhookError("Two directories have the same name, which names the picture of the mask: rename one.")
    return found


def _subject(subject: str | None, layers: list[str], drawn: bool) -> tuple[Path | None, list[str]]:
    """The table and the layers to draw; where layers are `drawn`, a subject that is not a file is a layer."""
    if subject is not None and drawn and not Path(subject).exists():
        return None, list(dict.fromkeys([subject, *layers]))
    return None if subject is None else Path(subject), layers


def _tables(table_file: Path, metrics: list[str], plans: list[Path]) -> dict[str, str]:
    """The pictures of a table and of plans for its layers, by file stem."""
    from billhook.errors import BillhookError
    from billhook.plan.metrics import fact
    from billhook.plan.table import Table
    from billhook.reports import pictures

    table = Table.load(table_file)
    curves = [name for name in metrics or table.rows[0].curves if fact(name).name == "error_curve"]
    chosen = [name for name in metrics or table.columns()[:1] if name not in curves]
    if not chosen and not curves and not plans:
        raise BillhookError(f"{table_file} has no columns: add one with billhook measure, or give a --plan.")
    named = load_plans(plans)
    found = {f"{metric}-by-layer": pictures.metric_by_layer(table, metric) for metric in chosen}
    found |= {f"sparsity-{name}": pictures.plan_by_layer(table, name, plan) for name, plan in named.items()}
    if len(named) > 1:
        found["sparsity-by-depth"] = pictures.plans_by_depth(table, named)
    sparsities = {name: plan.sparsity for name, plan in named.items()} or {"50 %": dict.fromkeys(table.shapes, 0.5)}
    for column in curves:
        found[column] = pictures.error_by_sparsity(table, column)
        for name, sparsity in sparsities.items():
            found[f"{column}-at-{name}"] = pictures.error_by_layer(table, column, name, sparsity)
    return found


def _weight(directory: str | Path, name: str) -> Any:
    """The weight [out, in] of one layer of a model on disk or on the hub."""
    from billhook.architectures.layers import find_layers
    from billhook.architectures.sources import resolve
    from billhook.errors import BillhookError
    from billhook.registry import hint
    from billhook.tasks.opening import load_model

    layers = find_layers(load_model(resolve(directory)), convolutions=True, outside=True)
    weights = {layer.name: layer for layer in layers}
    if name not in weights:
        raise BillhookError(f"{directory} has no prunable layer {name!r}.{hint(name, weights)}")
    return weights[name].weight


def _spectrum(model: str, name: str) -> str:
    from billhook.measurement.eigen import eigenvalues
    from billhook.measurement.tails import Spectrum
    from billhook.reports.pictures import spectrum

    evals = Spectrum(eigenvalues(_weight(model, name)))
    tails = {f"alpha_{cut}": (fit.alpha, fit.xmin) for cut in ("peak", "mid") for fit in [evals.fit(cut)]}
    return spectrum(name, evals.positive.tolist(), tails)


def _mask(directory: Path, name: str) -> str:
    from torch.nn.functional import avg_pool2d

    from billhook.reports.heat_maps import mask

    keep = (_weight(directory, name) != 0).float()
    tile = [-(-size // TILES) for size in keep.shape]
    tiles = (255 * avg_pool2d(keep[None], tile)[0]).round().byte()
    title = f"Mask of {name} in {directory.resolve().name}: {100 * keep.mean():.1f} % kept (white)"
    return mask(title, [bytes(row) for row in tiles.tolist()], keep.shape, standalone=True)
