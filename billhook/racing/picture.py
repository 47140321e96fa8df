"""The picture of a search: held-out loss against each hyperparameter, with uniform as a line."""

from pathlib import Path

from billhook.racing.hyperparameters import HYPERPARAMETERS, Space
from billhook.racing.race import Race
from billhook.reports.charts import Axis, Series, chart
from billhook.store.files import write_text

LABELS = {"kl": "KL divergence from dense (nats a token)", "nll": "negative log-likelihood (nats a token)"}


def draw(race: Race, space: Space, title: str, path: Path) -> None:
    """Write the picture as SVG; nothing where no allocator has a hyperparameter.

    A trial that was dropped is placed by its difference from uniform on the same windows.
    """
    uniform = next(iter(race.trials.values()))
    level = uniform.loss(race.objective)
    lines: dict[str, list[tuple[float, float, bool, str]]] = {}
    for trial in race.trials.values():
        if trial.allocator in space.allocators and (known := HYPERPARAMETERS.get(trial.allocator)) is not None:
            others = [f"{k}={v:g}" for k, v in trial.options.items() if isinstance(v, float) and k != known.name]
            loss = level + race.against_uniform(trial)[0]
            point = (space.fraction(trial), loss, trial.dropped, f"{trial.name}: {loss:.4f}")
            lines.setdefault(" ".join([trial.allocator, known.name, *others]), []).append(point)
    if not lines:
        return
    series = []
    for name, points in lines.items():
        places, losses, hollow, labels = zip(*sorted(points), strict=True)
        series.append(Series(name, places, losses, hollow=hollow, labels=labels))
    series.append(Series(f"uniform ({level:.4f})", [0, 1], [level, level], marks=False, dashed=True))
    heights = [level, *(point[1] for points in lines.values() for point in points)]
    x = Axis("hyperparameter, as a fraction of its range (0 is uniform); hollow: dropped early")
    y = Axis(LABELS[race.objective], log=min(heights) > 0 and max(heights) > 10 * min(heights))
    words = "One line for each allocator, the dashed one is uniform."
    write_text(path, chart(title, series, x, y, summary=words, standalone=True))
