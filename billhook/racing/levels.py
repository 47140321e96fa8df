"""Levels: a storage type for every tensor, under a budget in bytes, with the least divergence from the dense model.

    loss_l(v) = c_l · e_l(v),   c_l = share_l / e_l(type in the plan under which the share was measured)

e_l(v) is the relative error of layer l's output at type v (`billhook.measurement.level_errors`), share_l what the
layer's error costs the model when all layers are quantized (`billhook.trials.attribution`). The types with the least
sum of losses are found by `billhook.racing.knapsack`. As in `auto`, shares are measured again under each plan, and
their geometric mean is used for the next: rounds go on while they reduce the loss on held-out windows. The uniform plan
is always among the candidates, so the result is never worse on these windows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.method import Quantization
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.plan.plan import Budget, Plan
from billhook.plan.spec import Spec
from billhook.plan.storage import stored_bytes
from billhook.racing.knapsack import choose_levels
from billhook.racing.race import Candidate, Race
from billhook.trials.heldout import Split
from billhook.trials.trials import TrialRunner

ROUNDS = 3
Errors = Mapping[str, Mapping[str, float]]  # by layer name and type
Shares = Mapping[str, float]


@dataclass(frozen=True)
class Levels:
    """Types to choose from, under a `budget` of all tensors in bytes.

    `shapes` [out, in] and `errors` are those of the layers by name, `outside_shapes` and `losses` those of embeddings
    and head; `losses` are divergences of the model in which that tensor alone has a type. The layers of a tuple in
    `tied` get the same type, as programs need that fuse them.
    """

    shapes: Mapping[str, tuple[int, int]]
    errors: Errors
    budget: int
    tied: Sequence[tuple[str, ...]] = ()
    outside_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    losses: Errors = field(default_factory=dict)

    def groups(self) -> list[tuple[str, ...]]:
        """All layers, those that are tied together in one tuple, in the order of the model."""
        owner = {name: group for group in self.tied for name in group if name in self.shapes}
        return list(dict.fromkeys(owner.get(name, (name,)) for name in self.shapes))

    def optimum(self, weights: Shares) -> Plan:
        """The plan with the least sum of losses; raises BillhookError for a budget that cannot be met."""
        groups = [*self.groups(), *((name,) for name in self.outside_shapes)]
        types = [[t for t in self._menu(g[0]) if all(t in self._menu(name) for name in g)] for g in groups]
        costs = [[self._bytes(g, t) for t in menu] for g, menu in zip(groups, types, strict=True)]
        losses = [
            [math.fsum(self._loss(name, t, weights) for name in g) for t in menu]
            for g, menu in zip(groups, types, strict=True)
        ]
        chosen = choose_levels(costs, losses, self.budget)
        return self._plan({name: types[k][chosen[k]] for k, g in enumerate(groups) for name in g}, "curves")

    def uniform(self) -> Plan | None:
        """The same type in all layers, the largest within the budget, or None where there is none.

        Embeddings and head get the type with the least loss of those that leave room for the layers' smallest type.
        """
        common = set.intersection(*(set(menu) for menu in self.errors.values()))
        sizes = {t: self._bytes(tuple(self.shapes), t) for t in common}
        if not sizes or min(sizes.values()) > self.budget:
            return None
        outside = {}
        left = self.budget - min(sizes.values())
        for name, menu in self.losses.items():
            least = {other: min(self._bytes([other], t) for t in self.losses[other]) for other in self.losses}
            room = left - sum(size for other, size in least.items() if other != name and other not in outside)
            fits = [t for t in menu if self._bytes([name], t) <= room]
            if not fits:
                return None
            outside[name] = min(fits, key=lambda t, menu=menu: (menu[t], t))  # type: ignore[misc]
            left -= self._bytes([name], outside[name])
        room = self.budget - sum(self._bytes([name], t) for name, t in outside.items())
        best = max((t for t in common if sizes[t] <= room), key=lambda t: (sizes[t], t))
        return self._plan({**dict.fromkeys(self.shapes, best), **outside}, "uniform")

    def predicted(self, plan: Plan, weights: Shares) -> float:
        """The sum of losses of a plan."""
        types = {name: spec.type or "" for name, spec in plan.weights.items()} | plan.made_by["outside"]
        return math.fsum(self._loss(name, t, weights) for name, t in types.items())

    def _menu(self, name: str) -> Mapping[str, float]:
        return self.errors[name] if name in self.errors else self.losses[name]

    def _loss(self, name: str, type: str, weights: Shares) -> float:
        return weights[name] * self.errors[name][type] if name in self.errors else self.losses[name][type]

    def _bytes(self, names: Sequence[str], type: str) -> int:
        return sum(stored_bytes(type, self.shapes.get(name) or self.outside_shapes[name]) for name in names)

    def _plan(self, types: Mapping[str, str], allocator: str) -> Plan:
        weights = {name: Spec(type=types[name]) for name in self.shapes}
        outside = {name: types[name] for name in self.outside_shapes}
        made_by = {"allocator": allocator, "options": {}, "outside": outside}
        return Plan(Budget("bytes", self.budget), weights, made_by=made_by)


@dataclass(frozen=True)
class Chosen:
    """The best `plan`, and `outlook`: its predicted loss relative to which other budgets, by factor, would lose."""

    plan: Plan
    outlook: Mapping[float, float]


def choose_types(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    split: Split,
    levels: Levels,
    method: Quantization,
    progress: Progress = lambda line: None,
) -> Chosen:
    """The best plan on the held-out windows of `split`; the model's weights are restored."""
    with TrialRunner(model, layers, split.batches, split.heldout, method) as runner:
        race = Race(runner, progress=progress)
        race.run(lambda race: _candidates(levels, race))
    plan = race.result({"heldout": split.facts["heldout"]})
    measured = [name for name, trial in race.trials.items() if trial.shares]
    return Chosen(plan, _outlook(levels, plan, _mean([_weights(levels, race, name) for name in measured])))


def _outlook(levels: Levels, plan: Plan, weights: Shares) -> dict[float, float]:
    """The predicted loss with a tenth less and a tenth more budget, relative to that of `plan`."""
    own, found = levels.predicted(plan, weights), {}
    for factor in (0.9, 1.1):
        try:
            other = replace(levels, budget=int(levels.budget * factor)).optimum(weights)
        except BillhookError:
            continue
        found[factor] = levels.predicted(other, weights) / max(own, 1e-30)
    return found


def _candidates(levels: Levels, race: Race) -> Iterator[Candidate]:
    even = dict.fromkeys(levels.shapes, 1.0)
    first = levels.uniform() or levels.optimum(even)
    yield Candidate("uniform", first, attribute=True)
    weights = [_weights(levels, race, "uniform")]
    for number in range(1, ROUNDS + 1):
        name = "curves" if number == 1 else f"curves, round {number}"
        yield Candidate(name, levels.optimum(_mean(weights)), attribute=number < ROUNDS)
        trial = race.trials[name]
        if trial.dropped or (number > 1 and race.best is not trial):
            break
        weights.append(_weights(levels, race, name))


def _weights(levels: Levels, race: Race, name: str) -> Shares:
    """c_l of every layer, from the shares of a trial."""
    plan, shares = race.plans[name], race.trials[name].shares
    return {layer: share / levels.errors[layer][plan.weights[layer].type or ""] for layer, share in shares.items()}


def _mean(several: Sequence[Shares]) -> Shares:
    """The geometric mean for each layer."""
    return {layer: math.exp(math.fsum(math.log(w[layer]) for w in several) / len(several)) for layer in several[0]}
