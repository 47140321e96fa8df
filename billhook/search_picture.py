"""The picture of a search: held-out loss against the knob, uniform as a line. Needs matplotlib."""

from pathlib import Path

from billhook.files import write_atomic
from billhook.journal import Journal, loss_difference
from billhook.knobs import KNOBS

LABELS = {"kl": "KL divergence from the dense model (nats per token)", "nll": "negative log-likelihood (nats per token)"}


def draw(journal: Journal, objective: str, path: Path) -> bool:
    """Write the picture as SVG; False, and nothing written, where matplotlib is not installed or no allocator has a knob."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return False
    uniform = journal.trials[0]
    level = uniform.loss(objective)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(level, color="black", linewidth=1, linestyle="--", label=f"uniform ({level:.4f})")
    lines: dict[str, list[tuple[float, float, bool]]] = {}
    for run in journal.trials:
        if (knob := KNOBS.get(run.candidate.allocator)) is not None:
            options = dict(run.candidate.options)
            place = float(options.pop(knob.name) or 0)
            place = knob.high(journal.identity["blocks"], journal.identity["sparsity"]) - place if knob.falling else place
            name = " ".join([f"{run.candidate.allocator} {knob.name}", *(f"{key}={value}" for key, value in options.items())])
            lines.setdefault(name, []).append((place, level + loss_difference(run, uniform, objective)[0], run.stopped))
    if not lines:
        return False
    for name, points in lines.items():
        points.sort()
        largest = points[-1][0] or 1.0
        (line,) = axes.plot([p[0] / largest for p in points], [p[1] for p in points], linewidth=1, label=f"{name} (to {largest:.3g})")
        for stopped, face in ((False, line.get_color()), (True, "white")):
            chosen = [p for p in points if p[2] is stopped]
            axes.plot([p[0] / largest for p in chosen], [p[1] for p in chosen], "o", color=line.get_color(), markerfacecolor=face)
    heights = [level, *(p[1] for points in lines.values() for p in points)]
    if min(heights) > 0 and max(heights) > 10 * min(heights):
        axes.set_yscale("log")
    axes.set_xlabel("knob, as a fraction of the largest value tried (0 is uniform); hollow: given up early")
    axes.set_ylabel(LABELS[objective])
    axes.set_title(f"Cheap trials at sparsity {journal.identity['sparsity']:g} with {journal.identity['criterion']}: lower is better")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    with rc_context({"svg.hashsalt": "billhook"}):  # the same search gives the same bytes
        write_atomic(path, lambda temporary: FigureCanvasSVG(figure).print_svg(str(temporary), metadata={"Date": None}))
    return True
