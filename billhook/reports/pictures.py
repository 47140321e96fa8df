"""The pictures of `billhook plot` as SVG: a table and plans by layer, error curves, a spectrum with its tails."""

import re
from collections.abc import Mapping, Sequence
from statistics import median

from billhook.errors import BillhookError
from billhook.plan.allocators.curves import at
from billhook.plan.budget import mean
from billhook.plan.densities import density
from billhook.plan.front import front
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.reports.charts import Series, chart
from billhook.reports.heat_maps import by_kind, heat_map
from billhook.reports.scales import Axis

BLOCK = "block, from the input (0)"
SPARSITY = Axis("sparsity (%)", span=10)
ERROR = Axis("relative squared output error", log=True)


def metric_by_layer(table: Table, metric: str) -> str:
    """A heat map of a column of the table."""
    more = "more" if fact(metric).sign == 1 else "less"
    axis = Axis(f"{metric} (larger: can lose {more})")
    return _by_layer(table, f"{metric} by layer{_of(table)}", table.column(metric), axis, fact(metric).summary)


def plan_by_layer(table: Table, name: str, plan: Plan) -> str:
    """A heat map of the sparsities of a plan; raises BillhookError for a plan of other layers than the table's."""
    try:
        plan.check(table.shapes)
    except BillhookError as error:
        raise BillhookError(f"{name} is not a plan for the layers of this table: {error}") from None
    values = [100 * plan.sparsity[row.layer] for row in table]
    return _by_layer(table, f"Sparsity by layer: {name}, {100 * plan.target:g} %", values, SPARSITY)


def plans_by_depth(table: Table, plans: Mapping[str, Plan]) -> str:
    """The sparsity of each block under each plan, with the range over its layers as a band."""
    blocks, series = table.blocks(), []
    for name, plan in plans.items():
        layers = [[100 * plan.sparsity[row.layer] for row in rows] for rows in blocks.values()]
        sizes = [[row.n for row in rows] for rows in blocks.values()]
        means = [mean(values, n) for values, n in zip(layers, sizes, strict=True)]
        series.append(Series(name, list(blocks), means, list(map(min, layers)), list(map(max, layers))))
    title = "Sparsity by block (shaded: range over its layers)"
    return chart(title, series, Axis(BLOCK, whole=True), SPARSITY, standalone=True)


def error_by_layer(table: Table, column: str, name: str, sparsity: Mapping[str, float]) -> str:
    """A heat map of the error that each layer's curve predicts at its sparsity."""
    errors = [at(curve, sparsity[row.layer]) for row, curve in zip(table, table.curve(column), strict=True)]
    return _by_layer(table, f"{column} by layer at {name}", errors, ERROR)


def error_by_sparsity(table: Table, column: str) -> str:
    """Error curves: the median over the blocks for each kind of layer."""
    curves: dict[str, list[Sequence[float]]] = {}
    for row, curve in zip(table, table.curve(column), strict=True):
        curves.setdefault(_kind(row.kind), []).append(curve)
    x = [5.0 * k for k in range(1, 21)]
    series = [Series(k, x, [median(at(c, s / 100) for c in several) for s in x]) for k, several in curves.items()]
    title = f"{column}{_of(table)}: median over blocks"
    return chart(title, series, Axis("sparsity (%)"), ERROR, standalone=True)


def spectrum(layer: str, evals: Sequence[float], tails: Mapping[str, tuple[float, float]]) -> str:
    """The density of the positive eigenvalues (ascending) of W^T W on logarithmic axes.

    `tails` names fits (alpha, xmin): above xmin the density falls as eigenvalue^-alpha, a straight line here.
    """
    middles, heights = density(evals)
    if len(middles) < 3:
        raise BillhookError(f"{layer}: a spectral density needs at least three positive eigenvalues.")
    series = [Series(f"{len(evals)} eigenvalues", middles, heights)]
    for name, (alpha, xmin) in tails.items():
        share, reach = sum(e >= xmin for e in evals) / len(evals), evals[-1] / xmin
        start = share * (alpha - 1) / xmin / (1 - reach ** (1 - alpha))
        text = f"{name} = {alpha:.2f}, tail: largest {100 * share:.0f} %"
        series.append(Series(text, [xmin, evals[-1]], [start, start * reach**-alpha], dash=1))
    x, y = Axis("eigenvalue of W\u1d40W", log=True), Axis("density", log=True)
    return chart(f"Spectral density of {layer}", series, x, y, standalone=True)


def front_of(name: str, plan: Plan, loss: str) -> str:
    """Predicted loss against the bytes of the quantized tensors: the front, one type everywhere, and the choice.

    `loss` is what was predicted, in words.
    """
    found = front(plan)
    uniform = sorted(found.uniform.items(), key=lambda item: item[1])
    megabytes, losses = [[point[k] * unit for point in found.best] for k, unit in ((0, 1e-6), (1, 1.0))]
    series = [
        Series("a type for every tensor", megabytes, losses, marks=False),
        Series(
            "one type everywhere",
            [size / 1e6 for _, (size, _) in uniform],
            [loss for _, (_, loss) in uniform],
            labels=[f"{type}: {size / 1e6:.2f} MB, {loss:.4g}" for type, (size, loss) in uniform],
            line=False,
        ),
        Series("chosen", [found.chosen[0] / 1e6], [found.chosen[1]], line=False, best=0, colour=-1),
    ]
    x, y = Axis("quantized tensors (MB)"), Axis(f"predicted {loss}", log=True)
    return chart(f"Predicted loss by size: {name}", series, x, y, standalone=True)


def _by_layer(table: Table, title: str, values: Sequence[float], axis: Axis, summary: str = "") -> str:
    rows, columns, cells = by_kind([_kind(row.kind) for row in table], [row.block for row in table], values)
    return heat_map(title, rows, columns, cells, axis, x=BLOCK, summary=summary, standalone=True)


def _kind(kind: str) -> str:
    """The kind without the numbers of experts, whose mean is drawn."""
    return re.sub(r"\.\d+(?=\.|$)", "", kind)


def _of(table: Table) -> str:
    return f", {name}" if (name := table.model.get("name")) else ""
