"""Choose a storage type for every layer, under a budget in bytes, for the least divergence from the dense model.

    loss_l(v) = c_l · e_l(v),   c_l = share_l / e_l(type in the plan under which the share was measured)

e_l(v) is the relative error of layer l's output at type v (`billhook.measurement.level_errors`), share_l what the
layer's error costs the model when all layers are quantized (`billhook.trials.attribution`). The types with the least
sum of losses are found by `billhook.racing.knapsack`. As in `auto`, shares are measured again under each plan, and
their geometric mean is used for the next: rounds go on while they reduce the loss on held-out windows. The uniform plan
is always among the candidates, so the result is never worse on these windows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.method import Quantization
from billhook.engine.walk import Progress
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
    """Types to choose from: `shapes` [out, in] and `errors` by layer name, and the `budget` of all layers in bytes.

    The layers of a tuple in `tied` get the same type, as programs need that fuse them.
    """

    shapes: Mapping[str, tuple[int, int]]
    errors: Errors
    budget: int
    tied: Sequence[tuple[str, ...]] = field(default=())

    def groups(self) -> list[tuple[str, ...]]:
        """All layers, those that are tied together in one tuple, in the order of the model."""
        owner = {name: group for group in self.tied for name in group if name in self.shapes}
        return list(dict.fromkeys(owner.get(name, (name,)) for name in self.shapes))

    def optimum(self, weights: Shares) -> Plan:
        """The plan with the least sum of weight · error; raises BillhookError for a budget that cannot be met."""
        groups = self.groups()
        types = [[t for t in self.errors[g[0]] if all(t in self.errors[name] for name in g)] for g in groups]
        costs = [[self._bytes(g, t) for t in menu] for g, menu in zip(groups, types, strict=True)]
        losses = [
            [math.fsum(weights[name] * self.errors[name][t] for name in g) for t in menu]
            for g, menu in zip(groups, types, strict=True)
        ]
        chosen = choose_levels(costs, losses, self.budget)
        found = {name: types[k][chosen[k]] for k, g in enumerate(groups) for name in g}
        return self._plan(found, "curves")

    def uniform(self) -> Plan | None:
        """The same type everywhere, the largest within the budget, or None where there is none."""
        common = set.intersection(*(set(menu) for menu in self.errors.values()))
        sizes = {t: self._bytes(tuple(self.shapes), t) for t in common}
        fitting = [t for t in common if sizes[t] <= self.budget]
        if not fitting:
            return None
        best = max(fitting, key=lambda t: (sizes[t], t))
        return self._plan(dict.fromkeys(self.shapes, best), "uniform")

    def _bytes(self, names: Sequence[str], type: str) -> int:
        return sum(stored_bytes(type, self.shapes[name]) for name in names)

    def _plan(self, types: Mapping[str, str], allocator: str) -> Plan:
        weights = {name: Spec(type=types[name]) for name in self.shapes}
        return Plan(Budget("bytes", self.budget), weights, made_by={"allocator": allocator, "options": {}})


def choose_types(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    split: Split,
    levels: Levels,
    method: Quantization,
    progress: Progress = lambda line: None,
) -> Plan:
    """The best plan on the held-out windows of `split`; the model's weights are restored."""
    with TrialRunner(model, layers, split.batches, split.heldout, method) as runner:
        race = Race(runner, progress=progress)
        race.run(lambda race: _candidates(levels, race))
    return race.result({"heldout": split.facts["heldout"]})


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
