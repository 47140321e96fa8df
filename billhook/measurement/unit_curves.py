"""Error curves of units: the relative error of the output at every fraction of a unit's parts that is removed.

    e_u(s) = ‖(W − W'(s)) X‖² / ‖W X‖²   for s = 0, 1/40, …, 1

The output is that of the consumer, and of the whole mixture where experts are removed. The unit is made smaller alone
and sees the dense model's inputs X. The structured method runs at four fractions, and ln e is linear in between; e(0) =
0 and e(1) = 1. `curves` and `auto` read these curves where units are removed.

Cost: one pass of the text through the dense model with its statistics, and the method four times for each unit.

Limits: it does not say what a unit's error costs the model.
"""

import torch

from billhook.architectures.units import Unit
from billhook.engine.experts import choose_experts
from billhook.engine.walk import Block, Progress, walk
from billhook.measurement.error_curves import curve_through
from billhook.trials.unit_trials import UnitRunner

TRIED = (0.125, 0.25, 0.5, 0.75)
LEAST = 1e-9


@torch.no_grad()
def unit_curves(runner: UnitRunner, progress: Progress = lambda unit: None) -> dict[str, list[float]]:
    """Return e at 0, 1/40, ..., 1 by the name of each unit of a runner, whose model is dense now."""
    found = dict[str, list[float]]()
    layers = [unit.consumer for unit in runner.units if unit.consumer is not None]
    runner.restore_()
    statistics = runner.removal.without_target().observed if layers else ()
    for block in walk(runner.model, runner.batches, statistics, layers=layers, read_only=True):
        for unit in (unit for unit in runner.units if unit.block == block.index):
            errors = [_error(runner, unit, max(1, round((1 - s) * unit.count)), block) for s in TRIED]
            found[unit.name] = curve_through(TRIED, [min(max(error, LEAST), 1.0) for error in errors])
            progress(unit.name)
    return found


def _error(runner: UnitRunner, unit: Unit, count: int, block: Block) -> float:
    """The relative error with `count` parts."""
    if unit.consumer is None:
        return choose_experts(runner.model, unit, count, runner.experts, block).error
    return runner.choose_parts(unit, count, block)[2] or 0.0
