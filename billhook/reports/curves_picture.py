"""The picture of error curves: what pruning does to each layer's output, and where a plan stands on it. Needs
matplotlib."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from billhook.plan.allocators.curves import at
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.reports.plots import new_figure, of_model, planned_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 1e-5  # of the output's square, where the axis begins


def error_curves(table: Table, column: str, plan: Plan | None = None) -> "Figure":
    """How far pruning moves each layer's output: a panel a kind of layer, a line a layer, and a dot at what `plan`
    takes from it."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    curves = table.curve(column)
    if plan is not None:
        planned_rows(table, plan, "The plan")
    kinds = list(dict.fromkeys(row.kind for row in table))
    columns = min(len(kinds), 4)
    lines = math.ceil(len(kinds) / columns)
    figure = new_figure(max(7.0, 1.5 + 2.9 * columns), 1.9 + 2.7 * lines)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    shades, depth = colormaps["viridis"], Normalize(min(table.blocks()), max(table.blocks()))
    for row, curve in zip(table, curves, strict=True):
        _draw(
            panels[kinds.index(row.kind)],
            curve,
            shades(depth(row.block)),
            None if plan is None else plan.sparsity[row.layer],
        )
    for place, axes in enumerate(panels):
        axes.set_visible(place < len(kinds))
        axes.tick_params(labelbottom=place + columns >= len(kinds))
        axes.set(yscale="log", ylim=(100 * _LEAST, 150), title=kinds[min(place, len(kinds) - 1)])
        axes.title.set_fontsize(10)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        if plan is not None:
            axes.axvline(100 * plan.target, color="black", linestyle="--", linewidth=1)
    whole = MaxNLocator(integer=True)
    figure.colorbar(
        ScalarMappable(depth, shades), ax=panels, label="block, from the input (0)", shrink=0.8, ticks=whole
    )
    figure.supxlabel("weights removed from the layer (%)", fontsize=10)
    figure.supylabel("squared change of the layer's output (% of its square)", fontsize=10)
    chosen = (
        "100 %: the output is lost."
        if plan is None
        else "Dot: what the plan takes from it; dashed: the mean over all weights."
    )
    title = f"What pruning does to the output of each layer{of_model(table)} ({column})"
    figure.suptitle(f"{title}\nOne line is one layer, pruned alone. {chosen}", fontsize=10.5)
    return figure


def _draw(axes: Any, curve: Sequence[float], colour: Any, sparsity: float | None) -> None:
    """One layer's curve, with a dot at the sparsity that it gets."""
    steps = len(curve) - 1
    axes.plot([100 * k / steps for k in range(1, steps + 1)], [100 * e for e in curve[1:]], color=colour, linewidth=1)
    if sparsity is not None:
        height = 100 * max(at(curve, sparsity), 1.5 * _LEAST)  # a dot that would lie below the axis stands on it
        axes.plot(100 * sparsity, height, "o", color=colour, markersize=6, markeredgecolor="black", markeredgewidth=0.6)
