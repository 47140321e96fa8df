"""How many parts of each unit stay, by RCO: a descent on the budget's surface with the gradients of the true loss.

A unit is a group of `billhook.racing.rco`, and a level is a number of parts that stay. Of channels and heads, the
weight of a level is what the structured method makes of the consumer, with the dense model's statistics. Of experts it
is the stack of down projections with zeros for those that the experts' method removes; while gradients are taken
tokens go to all experts, because an expert without tokens has no gradient. The loss is smooth in the numbers of parts,
so each unit keeps its expected number under the last probabilities, whose sum is the budget, rounded by largest
remainder to its step.

Cost: the structured method at every level of every unit, then `steps` forward and backward passes of a few windows.

Limits: what the router does without a removed expert is not in the gradients, nor is the fit of what stays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from billhook.architectures.layers import Layer
from billhook.architectures.units import Unit
from billhook.engine.batch import join_rows
from billhook.engine.experts import choose_experts, down_projections
from billhook.engine.walk import Block, Progress, walk
from billhook.plan.plan import Plan
from billhook.plan.unit_counts import Size
from billhook.racing.allocators import MODEL_ALLOCATORS
from billhook.racing.candidates import GradientLevels, product
from billhook.racing.race import Candidate, Race
from billhook.racing.rco import descend
from billhook.racing.units import UnitProblem
from billhook.trials.unit_trials import UnitRunner

LEVELS = 8  # of a unit with more steps


class UnitLevels(GradientLevels):
    """The levels of units, `menus` of numbers of parts that stay, from few to all."""

    def __init__(
        self, runner: UnitRunner, menus: Sequence[Sequence[int]], *, progress: Progress = lambda line: None
    ) -> None:
        layers = [unit.consumer for unit in runner.units if unit.consumer is not None]
        inside = {unit.name: down_projections(runner.model, unit) for unit in runner.units if unit.consumer is None}
        known = {layer.name: layer for layer in layers} | {x.name: x for some in inside.values() for x in some}
        super().__init__(runner, list(known.values()), join_rows(runner.batches))
        self.menus = menus
        self._dense = {name: layer.weight.clone() for name, layer in known.items()}
        self._parts = {u.consumer.name: i for i, u in enumerate(runner.units) if u.consumer is not None}
        self._experts = {x.name: i for i, u in enumerate(runner.units) for x in inside.get(u.name, ())}
        self._weights: dict[int, list[Tensor]] = {}
        self._kept: dict[int, list[Tensor]] = {}
        self._fill(layers, progress)

    @property
    def counts(self) -> list[int]:
        """How many levels each unit has."""
        return list(map(len, self.menus))

    @torch.no_grad()
    def _fill(self, layers: Sequence[Layer], progress: Progress) -> None:
        """The weights of all levels, from the dense model's statistics."""
        runner = self.runner
        assert isinstance(runner, UnitRunner)
        statistics = runner.removal.without_target().observed if layers else ()
        for block in walk(runner.model, runner.batches, statistics, layers=layers, read_only=True):
            for i, unit in enumerate(runner.units):
                if unit.block == block.index:
                    if unit.consumer is None:
                        found = [choose_experts(runner.model, unit, n, runner.experts, block) for n in self.menus[i]]
                        self._kept[i] = [choice.keep for choice in found]
                    else:
                        self._weights[i] = [self._new(runner, unit, count, block) for count in self.menus[i]]
                    progress(unit.name)

    def _new(self, runner: UnitRunner, unit: Unit, count: int, block: Block) -> Tensor:
        assert unit.consumer is not None
        if count == unit.count:
            return unit.consumer.weight.clone()
        return runner.choose_parts(unit, count, block)[1].to(unit.consumer.weight.dtype)

    def _weight(self, layer: Layer, chosen: Sequence[int]) -> Tensor:
        """The weight of a layer at the level of its own parts, were its expert to stay."""
        i = self._parts.get(layer.name)
        return self._dense[layer.name] if i is None else self._weights[i][chosen[i]]

    def _stays(self, layer: Layer, chosen: Sequence[int]) -> bool:
        i = self._experts.get(layer.name)
        return i is None or bool(self._kept[i][chosen[i]][layer.expert])

    @torch.no_grad()
    def put_(self, chosen: Sequence[int]) -> None:
        """Put the weights of these levels, one a unit, into the model, whose routers know all experts."""
        for layer in self.layers:
            layer.weight.copy_(self._weight(layer, chosen) if self._stays(layer, chosen) else torch.tensor(0.0))

    def slopes(self, layer: Layer, gradient: Tensor, chosen: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
        """<gradient, W_k> for the levels of the unit that feeds a layer, and of the experts of which it is one."""
        if (i := self._parts.get(layer.name)) is not None:
            stays = float(self._stays(layer, chosen))
            yield i, [stays * product(gradient, weight) for weight in self._weights[i]]
        if (i := self._experts.get(layer.name)) is not None:
            whole = product(gradient, self._weight(layer, chosen))
            yield i, [whole * float(keep[layer.expert]) for keep in self._kept[i]]


def menu(size: Size) -> list[int]:
    """The numbers of parts that may stay, from the fewest to all, at even distances where there are many."""
    number = min(size.steps, LEVELS - 1)
    gone = sorted({round(size.steps * k / max(1, number)) for k in range(number + 1)}, reverse=True)
    return [size.count - k * size.step for k in gone]


def choose_by_descent(
    runner: UnitRunner,
    problem: UnitProblem,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    progress: Progress = lambda line: None,
) -> Plan:
    """The plan of RCO, or the uniform one where that is better on the held-out rows of `runner`.

    `facts` go into the plan's record of trials.
    """
    found = by_descent(runner, problem, options, progress)
    uniform = problem.plan(dict.fromkeys((s.name for s in problem.sizes), problem.sparsity or 0.0), "uniform", {})
    race = Race(runner, progress=progress)
    race.run(lambda race: iter([Candidate("uniform", uniform), Candidate("rco", found)]))
    best = race.result(facts)
    return replace(best, made_by={**best.made_by, "allocator": "rco"})


def by_descent(
    runner: UnitRunner, problem: UnitProblem, options: Mapping[str, Any], progress: Progress = lambda line: None
) -> Plan:
    """The plan of RCO for the units of a runner; the model is as before afterwards."""
    menus = [menu(size) for size in problem.sizes]
    levels = UnitLevels(runner, menus, progress=progress)
    costs = [[count * size.parameters for count in some] for size, some in zip(problem.sizes, menus, strict=True)]
    budget = sum(size.n for size in problem.sizes) - problem.remove
    configured = MODEL_ALLOCATORS.configure("rco", options)
    p = descend(levels, costs, budget, **configured).p
    runner.restore_()
    fractions = {
        size.name: 1 - sum(float(share) * count for share, count in zip(row, some, strict=False)) / size.count
        for size, some, row in zip(problem.sizes, menus, p, strict=True)
    }
    return problem.plan(fractions, "rco", configured)
