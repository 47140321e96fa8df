"""Levels: a storage type for every tensor, under a budget in bytes, with the least divergence from the dense model.

    loss_l(v) = c_l · e_l(v),   c_l = share_l / e_l(type in the plan under which the share was measured)

e_l(v) is the relative error of layer l's output at type v (`billhook.measurement.level_errors`), share_l what the
layer's error costs the model when all layers are quantized (`billhook.trials.attribution`). The types with the least
sum of losses are found by `billhook.plan.knapsack`. As in `auto`, shares are measured again under each plan, and
their geometric mean is used for the next: rounds go on while they reduce the loss on held-out windows. The uniform plan
is always among the candidates, so the result is never worse on these windows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.method import Quantization
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.plan.level_allocators import allocate_levels
from billhook.plan.levels import Levels, types_of
from billhook.plan.plan import Plan
from billhook.racing.race import Candidate, Race
from billhook.trials.heldout import Split
from billhook.trials.trials import TrialRunner

ROUNDS = 3
Weights = Mapping[str, float]  # by layer


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
    measured = [_weights(levels, race, name) for name, trial in race.trials.items() if trial.shares]
    return Chosen(plan, outlook(replace(levels, weights=_mean(measured)), plan))


def outlook(levels: Levels, plan: Plan) -> dict[float, float]:
    """The predicted loss with a tenth less and a tenth more budget, relative to that of `plan`."""
    own, found = levels.predicted(types_of(plan)), {}
    for factor in (0.9, 1.1):
        try:
            other = allocate_levels(replace(levels, budget=int(levels.budget * factor)))
        except BillhookError:
            continue
        found[factor] = levels.predicted(types_of(other)) / max(own, 1e-30)
    return found


def _candidates(levels: Levels, race: Race) -> Iterator[Candidate]:
    yield Candidate("uniform", allocate_levels(levels, "uniform"), attribute=True)
    weights = [_weights(levels, race, "uniform")]
    for number in range(1, ROUNDS + 1):
        name = "curves" if number == 1 else f"curves, round {number}"
        yield Candidate(name, allocate_levels(replace(levels, weights=_mean(weights))), attribute=number < ROUNDS)
        trial = race.trials[name]
        if trial.dropped or (number > 1 and race.best is not trial):
            break
        weights.append(_weights(levels, race, name))


def _weights(levels: Levels, race: Race, name: str) -> Weights:
    """c_l of every layer, from the shares of a trial."""
    plan, shares = race.plans[name], race.trials[name].shares
    return {layer: share / levels.errors[layer][plan.weights[layer].type or ""] for layer, share in shares.items()}


def _mean(several: Sequence[Weights]) -> Weights:
    """The geometric mean for each layer."""
    return {layer: math.exp(math.fsum(math.log(w[layer]) for w in several) / len(several)) for layer in several[0]}
