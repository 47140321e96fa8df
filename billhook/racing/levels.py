"""Auto for levels: several allocations of storage types are tried in full on held-out windows, and the best is used.

`billhook compress --allocator auto` quantizes the whole model with each candidate, with half of the calibration
windows, and scores it by KL divergence from the dense model on the other half:

1. `uniform`. Each layer's share of its divergence is measured by one backward pass (`billhook.trials.attribution`).
2. `curves` with the costs that `billhook compress` measures without trials, and the published forms AlphaQ and ATP.
3. The types with the least sum of c_l · e_l(v), with c_l = share_l / e_l(type under which the share was measured). As
   in the `auto` of sparsities, shares are measured again under each such plan, and their geometric mean is used for
   the next: rounds go on while they reduce the loss on the held-out windows, up to three.

Uniform is always among the candidates, so the result is never worse on these windows.

Cost: a quantization and an evaluation for each of five to seven candidates. The model and a copy of its weights must
fit in memory.

Limits: trials leave embeddings and head as they are; those get the types of `curves`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.batch import Batch
from billhook.engine.method import Quantization
from billhook.engine.walk import Progress
from billhook.plan.allocators import AUTO
from billhook.plan.level_allocators import ERRORS, LEVEL_ALLOCATORS, WEIGHTS, allocate_levels
from billhook.plan.levels import Levels, Types, types_of
from billhook.plan.plan import Plan
from billhook.plan.spec import Spec
from billhook.racing.allocators import MODEL_ALLOCATORS
from billhook.racing.candidates import CandidateWeights
from billhook.racing.race import Candidate, Race
from billhook.trials.heldout import Split
from billhook.trials.trials import TrialRunner

ROUNDS = 3
PUBLISHED = ("alphaq", "atp")  # which `auto` tries
Weights = Mapping[str, float]  # by layer


@dataclass(frozen=True)
class Chosen:
    """The best `plan`, and the predicted loss of other sizes, by factor, relative to that of its own."""

    plan: Plan
    loss_by_size: Mapping[float, float]


def choose_types(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    split: Split,
    levels: Levels,
    method: Quantization,
    *,
    allocator: str = AUTO,
    options: Mapping[str, Any] | None = None,
    fixed: int = 0,
    progress: Progress = lambda line: None,
) -> Chosen:
    """The plan of `auto`, or of an allocator that needs the model; the model's weights are restored.

    `method` is how trials quantize, `fixed` the bytes beside the budget of `levels`. Embeddings and head, which trials
    leave as they are, get the types of `curves`.
    """
    outside = _outside(levels)
    inner = _layers_only(levels, outside)
    with TrialRunner(model, layers, split.batches, split.heldout, method) as runner:
        if allocator == AUTO:
            race = Race(runner, progress=progress)
            race.run(lambda race: _candidates(inner, race, split))
            plan = race.result({"heldout": split.facts["heldout"]})
            measured = [_weights(inner, race, name) for name, trial in race.trials.items() if trial.shares]
            levels = replace(levels, weights={**levels.weights, **_mean(measured)})
        else:
            plan = by_gradients(runner, inner, split.batches, allocator, options or {}, progress)
    made_by = {**plan.made_by, **levels.recorded()}
    plan = levels.plan(types_of(plan) | outside, made_by)
    return Chosen(plan, loss_by_size(levels, fixed))


def columns() -> list[str]:
    """The columns that the candidates of `auto` read."""
    return list(dict.fromkeys(c for name in PUBLISHED for c in needs(name) if c not in (ERRORS, WEIGHTS)))


def needs(name: str) -> tuple[str, ...]:
    """What an allocator reads with its default options."""
    return LEVEL_ALLOCATORS.needs(name, LEVEL_ALLOCATORS.configure(name, {}))


def _outside(levels: Levels) -> Types:
    """The types of embeddings and head in the plan of `curves`."""
    types = types_of(allocate_levels(levels)) if levels.outside else {}
    return {name: types[name] for name in levels.outside}


def _layers_only(levels: Levels, outside: Types) -> Levels:
    """The levels of the layers, and what the types `outside` leave of the budget."""
    taken = sum(levels.bytes([name], type) for name, type in outside.items())
    shapes = {name: shape for name, shape in levels.shapes.items() if name not in outside}
    return replace(levels, shapes=shapes, budget=levels.budget - taken, outside=())


def by_gradients(
    runner: TrialRunner,
    levels: Levels,
    batches: Sequence[Batch],
    allocator: str,
    options: Mapping[str, Any],
    progress: Progress = lambda line: None,
) -> Plan:
    """The plan of an allocator that takes gradients of the model on `batches`.

    Of the types of a group those are left out that take as many bytes as another, or more, and lose more.
    """
    steps = []
    for group in levels.groups:
        priced = [(levels.bytes(group, t), levels.loss(group, t), t) for t in levels.menu(group)]
        kept: list[tuple[int, float, str]] = []
        for size, loss, t in sorted(priced, key=lambda entry: entry[:2]):
            if not kept or loss < kept[-1][1]:
                kept.append((size, loss, t))
        steps.append(kept)
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    specs = [[Spec(type=type) for *_, type in kept] for kept in steps]
    assert isinstance(runner.method, Quantization)
    exact = replace(runner.method, options={**runner.method.options, "dense_target": 0.0, "sweeps": 0})
    weights = CandidateWeights(runner, levels.groups, specs, rows, exact, progress=progress)
    costs = [[size for size, *_ in kept] for kept in steps]
    configured = MODEL_ALLOCATORS.configure(allocator, options)
    chosen = MODEL_ALLOCATORS.get(allocator)(weights, costs, levels.budget, **configured)
    types = {name: steps[g][k][-1] for g, k in enumerate(chosen) for name in levels.groups[g]}
    made_by = {"allocator": allocator, "options": configured, "paper": MODEL_ALLOCATORS.paper(allocator)}
    return levels.plan(types, made_by)


def loss_by_size(levels: Levels, fixed: int) -> dict[float, float]:
    """The predicted loss of a file with a tenth less and a tenth more bytes, relative to that of this size.

    All three are those of the types of `curves`; of a file, `fixed` bytes are not part of the budget.
    """

    def loss(budget: int) -> float:
        return levels.predicted(types_of(allocate_levels(replace(levels, budget=budget))))

    own, found = loss(levels.budget), {}
    for factor in (0.9, 1.1):
        budget = int((levels.budget + fixed) * factor) - fixed
        if budget >= levels.least:
            found[factor] = loss(budget) / max(own, 1e-30)
    return found


def _candidates(levels: Levels, race: Race, split: Split) -> Iterator[Candidate]:
    yield Candidate("uniform", allocate_levels(levels, "uniform"), attribute=True)
    weights = [_weights(levels, race, "uniform")]
    if levels.weights:
        yield Candidate("curves", allocate_levels(levels))
    for name in PUBLISHED:
        if set(needs(name)) <= {*levels.table.columns(), ERRORS, WEIGHTS}:
            yield Candidate(name, allocate_levels(levels, name))
    for number in range(1, ROUNDS + 1):
        name = f"curves of shares, round {number}"
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
