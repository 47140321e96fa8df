"""Error curves of units: the relative error of a consumer's output at every fraction of its parts that is removed.

    e_u(s) = ‖(W − W'(s)) X‖² / ‖W X‖²   for s = 0, 1/40, …, 1

The unit is made smaller alone and sees the dense model's inputs X. The structured method runs at four fractions, and ln
e is linear in between; e(0) = 0 and e(1) = 1. `curves` and `auto` read these curves where units are removed.

Cost: one pass of the text through the dense model with its statistics, and the method four times for each unit.

Limits: it does not say what a unit's error costs the model.
"""

from dataclasses import replace

import torch

from billhook.engine.removal import choose_parts
from billhook.engine.walk import Progress, walk
from billhook.measurement.error_curves import curve_through
from billhook.methods.statistics import LayerStats
from billhook.trials.unit_trials import UnitRunner

TRIED = (0.125, 0.25, 0.5, 0.75)
LEAST = 1e-9


@torch.no_grad()
def unit_curves(runner: UnitRunner, progress: Progress = lambda unit: None) -> dict[str, list[float]]:
    """Return e at 0, 1/40, ..., 1 by the name of each unit of a runner, whose model is dense now."""
    known = {unit.consumer.name: unit for unit in runner.units if unit.consumer is not None}
    removal, found = runner.removal.without_target(), dict[str, list[float]]()
    runner.restore_()
    for block in walk(runner.model, runner.batches, removal.observed, layers=runner.layers, read_only=True):
        for layer in block.layers:
            unit, stats = known[layer.name], block.stats.get(layer.name, LayerStats(0, 0))
            gradient = None if runner.dense_gradients is None else runner.dense_gradients[layer.name]
            errors = []
            for s in TRIED:
                count = max(1, round((1 - s) * unit.count))
                error = choose_parts(unit, count, removal, replace(stats, notes=[]), gradient)[2]
                errors.append(min(max(error or 0.0, LEAST), 1.0))
            found[unit.name] = curve_through(TRIED, errors)
            progress(unit.name)
    return found
