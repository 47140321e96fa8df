"""The picture of a search: held-out loss against the knob's place in its range, uniform as a line. Needs matplotlib."""

from pathlib import Path

from billhook.files import write_atomic
from billhook.journal import Journal, loss_difference
from billhook.knobs import TICKS

LABELS = {"kl": "KL divergence from the dense model (nats per token)", "nll": "negative log-likelihood (nats per token)"}


def draw(journal: Journal, objective: str, path: Path) -> bool:
    """Write the picture as SVG; False, and nothing written, where matplotlib is not installed or no trial has a knob."""
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
    for name in dict.fromkeys(t.candidate.allocator for t in journal.trials if t.candidate.tick is not None):
        runs = sorted((t for t in journal.trials if t.candidate.allocator == name), key=lambda t: t.candidate.tick or 0)
        points = [((t.candidate.tick or 0) / TICKS, level + loss_difference(t, uniform, objective)[0], t.stopped) for t in runs]
        (line,) = axes.plot([p[0] for p in points], [p[1] for p in points], linewidth=1, label=name)
        for stopped, face in ((False, line.get_color()), (True, "white")):
            chosen = [p for p in points if p[2] is stopped]
            axes.plot([p[0] for p in chosen], [p[1] for p in chosen], "o", color=line.get_color(), markerfacecolor=face)
    if not axes.lines[1:]:
        return False
    axes.set_yscale("log")
    axes.set_xlabel("knob, as a fraction of its range (0 is uniform); hollow: given up early")
    axes.set_ylabel(LABELS[objective])
    axes.set_title(f"Cheap trials at sparsity {journal.identity['sparsity']:g} with {journal.identity['criterion']}: lower is better")
    axes.legend()
    with rc_context({"svg.hashsalt": "billhook"}):  # the same search gives the same bytes
        write_atomic(path, lambda temporary: FigureCanvasSVG(figure).print_svg(str(temporary), metadata={"Date": None}))
    return True
