"""The picture of a search: held-out loss against each hyperparameter, with uniform as a line."""

from pathlib import Path

from billhook.evaluation.scoring import each, measured
from billhook.racing.hyperparameters import HYPERPARAMETERS, Space
from billhook.racing.race import Race, Trial
from billhook.reports.charts import Series, chart
from billhook.reports.scales import Axis
from billhook.store.files import write_text


def draw(race: Race, space: Space, title: str, path: Path) -> None:
    """Write the picture as SVG; nothing where no allocator has a hyperparameter.

    A trial is placed by its difference from uniform on the windows on which it was scored; bars are standard errors of
    these differences.
    """
    task = race.runner.task
    loss = measured(task.unit) if race.objective == "kl" else f"negative log-likelihood, nats {each(task.unit)}"
    lines: dict[str, list[tuple[float, Trial]]] = {}
    for trial in race.trials.values():
        if trial.allocator in space.allocators and space.has_range(trial.allocator):
            known = HYPERPARAMETERS[trial.allocator]
            others = [f"{k}={v:g}" for k, v in trial.options.items() if isinstance(v, float) and k != known.name]
            name = " ".join([trial.allocator, known.name, *others])
            lines.setdefault(name, []).append((space.fraction(trial), trial))
    if not lines:
        return
    series = [_series(race, name, sorted(points, key=lambda point: point[0])) for name, points in lines.items()]
    uniform = race.trials["uniform"]
    level = uniform.loss(race.objective)
    best = 0 if race.best is uniform else None
    name = f"uniform ({level:.4f})"
    series.append(Series(name, [0, 1], [level, level], marks=best == 0, best=best, colour=-1, dash=1))
    heights = [y for one in series for y in one.y if y is not None]
    x, y = Axis("place in the range (0: uniform)"), Axis(loss, log=max(heights) > 4 * min(heights) > 0)
    words = "A line for each allocator; hollow points were dropped early, bars are standard errors against uniform."
    title += " (ring: best; hollow: dropped early)"
    write_text(path, chart(title, series, x, y, summary=words, standalone=True))


def _series(race: Race, name: str, points: list[tuple[float, Trial]]) -> Series:
    """The trials of one allocator, by the place of the hyperparameter in its range."""
    level = race.trials["uniform"].loss(race.objective)
    differences = [race.against_uniform(trial) for _, trial in points]
    losses = [level + difference for difference, _ in differences]
    low, high = ([y + sign * error for y, (_, error) in zip(losses, differences, strict=True)] for sign in (-1, 1))
    trials = [trial for _, trial in points]
    labels = [f"{trial.name}: {y:.4f} +- {e:.4f}" for trial, y, (_, e) in zip(trials, losses, differences, strict=True)]
    hollow, best = [trial.dropped for trial in trials], trials.index(race.best) if race.best in trials else None
    places = [place for place, _ in points]
    return Series(name, places, losses, low, high, hollow=hollow, labels=labels, bars=True, best=best)
