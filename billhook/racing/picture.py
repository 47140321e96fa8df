"""The picture of a search: held-out loss against the knob, uniform as a line."""

from pathlib import Path

from billhook.racing.journal import Journal, loss_difference
from billhook.racing.knobs import KNOBS
from billhook.reports.charts import Axis, Series, chart
from billhook.store.files import write_text

LABELS = {"kl": "KL divergence from dense (nats a token)", "nll": "negative log-likelihood (nats a token)"}


def draw(journal: Journal, objective: str, path: Path) -> bool:
    """Write the picture as SVG; False, and nothing written, where no allocator has a knob."""
    uniform = journal.trials[0]
    level = uniform.loss(objective)
    lines: dict[str, list[tuple[float, float, bool]]] = {}
    for run in journal.trials:
        if (knob := KNOBS.get(run.candidate.allocator)) is not None:
            options = dict(run.candidate.options)
            place = float(options.pop(knob.name) or 0)
            place = (
                knob.high(journal.identity["blocks"], journal.identity["sparsity"]) - place if knob.falling else place
            )
            name = " ".join(
                [f"{run.candidate.allocator} {knob.name}", *(f"{key}={value}" for key, value in options.items())]
            )
            lines.setdefault(name, []).append((place, level + loss_difference(run, uniform, objective)[0], run.stopped))
    if not lines:
        return False
    series = [_series(name, sorted(points)) for name, points in lines.items()]
    heights = [level, *(p[1] for points in lines.values() for p in points)]
    series.append(Series(f"uniform ({level:.4f})", [0, 1], [level, level], marks=False, dashed=True))
    title = (
        f"Cheap trials at sparsity {journal.identity['sparsity']:g} with {journal.identity['criterion']}: lower is "
        "better"
    )
    x = Axis("knob, as a share of the largest tried (0 is uniform); hollow: given up early")
    y = Axis(LABELS[objective], log=min(heights) > 0 and max(heights) > 10 * min(heights))
    write_text(
        path,
        chart(title, series, x, y, summary="One line for each allocator, the dashed one is uniform.", standalone=True),
    )
    return True


def _series(name: str, points: list[tuple[float, float, bool]]) -> Series:
    """A line over (knob, loss, given up), its knob as a share of the largest."""
    largest = points[-1][0] or 1.0
    shares, labels = [p[0] / largest for p in points], [f"{name} {p[0]:.4g}: {p[1]:.4f}" for p in points]
    return Series(
        f"{name} (to {largest:.3g})", shares, [p[1] for p in points], hollow=[p[2] for p in points], labels=labels
    )
