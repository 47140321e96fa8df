"""Pictures of tables, plans, spectra and masks, made to be understood without the papers. Needs matplotlib, imported
only here.

Every function returns a matplotlib Figure; `save` writes it as SVG and PNG. Colours are those of Okabe & Ito, which
people with any kind of colour vision can tell apart; lines also differ in their markers.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from billhook.errors import BillhookError
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.table import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A800")
MARKERS = "osD^vPX*"
ALPHAS = ("alpha_peak", "alpha_mid", "alpha_ks", "alpha_farms", "alpha_farms_mid")
TITLES = {
    **dict.fromkeys(ALPHAS, "Tail exponent of the weight spectrum"),
    "entropy": "Entropy of the weight spectrum",
    "stable_rank": "Stable rank of the weights",
    "outlier_ratio": "Outliers among the Wanda scores",
    "wanda_mean": "Mean of the Wanda scores",
    "wanda_median": "Median of the Wanda scores",
    "block_loss": "Rise of the loss when one block is pruned",
    "loss_share": "What each layer's error costs the model",
    "randomized_distance": "Distance of the spectrum from noise",
}
UNITS = {
    "outlier_ratio": "% of scores",
    "randomized_distance": "0 = like noise, 1 = nothing in common",
    "entropy": "0 = one direction, 1 = flat",
    "block_loss": "relative rise of the loss",
    "loss_share": "nats a token",
    "stable_rank": "as many equal directions",
}


def new_figure(width: float = 9.0, height: float = 4.8) -> "Figure":
    """An empty figure; raises BillhookError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BillhookError("Pictures need matplotlib: pip install 'billhook[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", folder: Path, stem: str) -> list[Path]:
    """Write STEM.svg and STEM.png into a folder, which is made if need be; characters unfit for a file name become
    '_'."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)
    paths = [folder / f"{stem}.svg", folder / f"{stem}.png"]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def metric_by_depth(table: Table, metric: str) -> "Figure":
    """A metric over depth: a line for each kind of layer (the mean where a block has several), and the mean of each
    block."""
    table.column(metric)
    figure = new_figure()
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row.kind for row in table))
    everywhere = fact(metric).block
    for number, kind in enumerate([] if everywhere else kinds):
        points = {
            block: [row.metrics[metric] for row in rows if row.kind == kind] for block, rows in table.blocks().items()
        }
        x = [block for block, values in points.items() if values]
        axes.plot(x, [_mean(points[block]) for block in x], linewidth=1.1, markersize=4.5, label=kind, **_style(number))
    means = {block: _mean([row.metrics[metric] for row in rows]) for block, rows in table.blocks().items()}
    if everywhere:
        axes.plot(list(means), list(means.values()), **_style(0))
    else:
        axes.plot(
            list(means),
            list(means.values()),
            color="#555555",
            linewidth=3.5,
            alpha=0.7,
            label="mean of the block",
            zorder=0,
        )
        _legend(figure)
    axes.set_ylabel(_with_unit(metric))
    _depth(axes, table)
    _title(axes, f"{_plain(metric)}, by depth{of_model(table)}", _reading(metric))
    return figure


def metric_against_sparsity(table: Table, metric: str, plans: Mapping[str, Plan]) -> "Figure":
    """What each layer loses against its metric: one panel for each of `plans` (at least one), one point for each
    layer."""
    values = table.column(metric)
    columns = min(len(plans), 3)
    rows = math.ceil(len(plans) / columns)
    figure = new_figure(max(7.0, 1.5 + 3.4 * columns), 1.6 + 3.2 * rows)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    depth = [row.block for row in table]
    for axes, (name, plan) in zip(panels, plans.items(), strict=False):
        shares = [100 * plan.sparsity[row.layer] for row in planned_rows(table, plan, name)]
        points = axes.scatter(values, shares, c=depth, cmap="viridis", s=22, alpha=0.85, linewidths=0)
        axes.axhline(100 * plan.target, color="black", linestyle="--", linewidth=1)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.25)
    for axes in panels[len(plans) :]:
        axes.set_visible(False)
    figure.colorbar(points, ax=panels, label="block, from the input (0)", shrink=0.8)
    figure.supxlabel(_with_unit(metric), fontsize=10)
    figure.supylabel("weights removed from the layer (%)", fontsize=10)
    explained = (
        "One point is one layer; a row of points: a block pruned evenly; dashed: the mean over all "
        f"weights.\n{_reading(metric)}"
    )
    figure.suptitle(f"How much each layer{of_model(table)} loses, against its {metric}\n{explained}", fontsize=10.5)
    return figure


def sparsity_by_depth(table: Table, plans: Mapping[str, Plan]) -> "Figure":
    """What each block loses under each plan, with the range over its layers where they differ, and the target as a
    dashed line."""
    figure = new_figure()
    axes = figure.subplots()
    for number, (name, plan) in enumerate(plans.items()):
        planned_rows(table, plan, name)
        blocks = table.blocks()
        inside = [[100 * plan.sparsity[row.layer] for row in rows] for rows in blocks.values()]
        means = [
            sum(s * row.n for s, row in zip(values, rows, strict=True)) / sum(row.n for row in rows)
            for values, rows in zip(inside, blocks.values(), strict=True)
        ]
        (line,) = axes.plot(list(blocks), means, markersize=5, label=name, **_style(number))
        if any(max(values) - min(values) > 0.05 for values in inside):
            axes.fill_between(
                list(blocks),
                [min(v) for v in inside],
                [max(v) for v in inside],
                color=line.get_color(),
                alpha=0.15,
                linewidth=0,
            )
    for target in sorted({plan.target for plan in plans.values()}):
        axes.axhline(
            100 * target, color="black", linestyle="--", linewidth=1, label=f"mean over all: {100 * target:g} %"
        )
    axes.set_ylabel("weights removed (%)")
    _depth(axes, table)
    _title(
        axes,
        f"How much each block{of_model(table)} loses",
        "Shaded: from the least to the most pruned layer of a block, where they differ.",
    )
    _legend(figure)
    return figure


def spectral_density(layer: str, evals: Sequence[float], fits: Mapping[str, Any]) -> "Figure":
    """The density of the eigenvalues of W^T W on log-log axes with fitted tails.

    `evals` > 0 ascending; `fits` names billhook.measurement.tails.TailFit objects, e.g. {"alpha_peak": fit}.
    """
    if len(evals) < 3 or evals[0] <= 0:
        raise BillhookError(f"{layer}: a spectral density needs at least three positive eigenvalues.")
    figure = new_figure(height=6.0)
    axes = figure.subplots()
    edges, density = _log_histogram(evals)
    shown = [d if d > 0 else math.nan for d in density]
    axes.stairs(
        shown,
        edges,
        fill=True,
        color="#BBBBBB",
        baseline=min(d for d in density if d > 0) / 3,
        label=f"{len(evals)} eigenvalues",
    )
    for number, (name, fit) in enumerate(fits.items()):
        colour, line = COLOURS[(0, 3, 2)[number % 3]], ("-", "--", ":")[number % 3]
        share = sum(e >= fit.xmin for e in evals) / len(evals)
        reach = evals[-1] / fit.xmin
        x = [fit.xmin * reach ** (i / 50) for i in range(51)]
        height = share * (fit.alpha - 1) / fit.xmin / (1 - reach ** (1 - fit.alpha))
        label = (
            f"{name} = {fit.alpha:.2f}: the tail falls as eigenvalue^-{fit.alpha:.2f} (misfit {fit.ks_distance:.3f}, "
            "0 is perfect)"
        )
        axes.plot(
            x,
            [height * (e / fit.xmin) ** -fit.alpha for e in x],
            color=colour,
            linestyle=line,
            linewidth=2,
            label=label,
        )
        axes.axvline(
            fit.xmin,
            color=colour,
            linestyle=line,
            linewidth=1,
            label=f"its tail begins here: the largest {100 * share:.0f} %",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("eigenvalue of WᵀW (square of a singular value)")
    axes.set_ylabel("density of eigenvalues")
    _title(
        axes,
        f"How the eigenvalues of {layer} are spread",
        "A slowly falling tail (a small exponent) marks a well-trained layer.",
    )
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure


def kept_weights(layer: str, masks: Mapping[str, Any]) -> "Figure":
    """Kept weights by place, one panel for each of `masks` (name -> bool [out, in], numpy), with the share kept of each
    row and column."""
    figure = new_figure(0.8 + 4.4 * len(masks), 5.2)
    for panel, (name, keep) in zip(figure.subplots(1, len(masks), squeeze=False)[0], masks.items(), strict=True):
        place = (0, keep.shape[1], keep.shape[0], 0)
        panel.imshow(_shrunk(keep), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto", extent=place)
        panel.set_title(f"{name}: {100 * keep.mean():.1f} % kept", fontsize=10)
        panel.set_xlabel("input (column)")
        panel.set_ylabel("output (row)")
        _margin(panel.inset_axes((0, 1.1, 1, 0.12), sharex=panel), 100 * keep.mean(axis=0), across=True)
        _margin(panel.inset_axes((1.03, 0, 0.12, 1), sharey=panel), 100 * keep.mean(axis=1), across=False)
    figure.suptitle(
        f"Weights that are left in {layer}: white is kept, black is removed\nAbove and beside: the share kept of "
        "each column and row. "
        "A stripe is an input or output that the method treats as a whole.",
        fontsize=10.5,
    )
    return figure


def _margin(axes: Any, share: Any, across: bool) -> None:
    """The share kept of each column (`across`, above the picture) or row (beside it)."""
    place = [i + 0.5 for i in range(len(share))]
    axes.plot(*((place, share) if across else (share, place)), color=COLOURS[0], linewidth=0.6)
    axes.tick_params(labelbottom=not across, labelleft=across, labelsize=7)
    (axes.set_ylim if across else axes.set_xlim)(0, 105)
    (axes.set_yticks if across else axes.set_xticks)([50, 100])
    (axes.set_ylabel if across else axes.set_xlabel)("% kept", fontsize=7)


def _shrunk(keep: Any, most: int = 1024) -> Any:
    """Shares kept in equal tiles, so that a picture of a large mask shows grey where the screen has no room, and not a
    random sample."""
    rows, columns = (math.ceil(size / most) for size in keep.shape)
    if rows == columns == 1:
        return keep.astype(float)
    cropped = keep[: keep.shape[0] // rows * rows, : keep.shape[1] // columns * columns]
    return cropped.reshape(cropped.shape[0] // rows, rows, cropped.shape[1] // columns, columns).mean(axis=(1, 3))


def _log_histogram(evals: Sequence[float]) -> tuple[list[float], list[float]]:
    """Edges [bins + 1], equal in the logarithm, and the share of eigenvalues per unit in each bin."""
    bins = max(10, min(60, len(evals) // 6))
    low, high = math.log(evals[0]), math.log(evals[-1])
    step = (high - low) / bins or 1.0
    counts = [0] * bins
    for e in evals:
        counts[min(int((math.log(e) - low) / step), bins - 1)] += 1
    edges = [math.exp(low + i * step) for i in range(bins + 1)]
    return edges, [c / len(evals) / (edges[i + 1] - edges[i]) for i, c in enumerate(counts)]


def planned_rows(table: Table, plan: Plan, name: str) -> Sequence[Row]:
    """The rows of the table; raises BillhookError where the plan is not for its layers."""
    try:
        plan.check(table.shapes)
    except BillhookError as error:
        raise BillhookError(f"{name} and the table do not belong together: {error}") from None
    return table.rows


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(metric: str) -> str:
    """What a metric is, in words."""
    title = TITLES.get(metric.partition(":")[0])
    return f"{title} ({metric})" if title else f"{metric}: {fact(metric).summary}"


def _with_unit(metric: str) -> str:
    base = metric.partition(":")[0]
    unit = "exponent, without unit" if base in ALPHAS else UNITS.get(base)
    return f"{metric} ({unit})" if unit else metric


def _reading(metric: str) -> str:
    more, less = ("larger", "smaller") if fact(metric).sign == 1 else ("smaller", "larger")
    return f"How it is used: {less} means keep more, {more} means prune more."


def of_model(table: Table) -> str:
    """The words ` of NAME`, where the table says which model it is of."""
    name = table.model.get("name")
    return f" of {name}" if name else ""


def _depth(axes: Any, table: Table) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("block, from the input (0) to the output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(f"{title}\n", fontsize=12, loc="left")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#444444")


def _legend(figure: "Figure") -> None:
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
