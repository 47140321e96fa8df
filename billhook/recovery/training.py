"""Train what a pruned model has left, with the dense model as its teacher, and never return a worse one.

The trained entries (`billhook.recovery.trained`) are the weights that are not zero and, with `kept+norms`, all
parameters of one dimension (norms and biases). A step has few tokens, about five hundred: for equal tokens more steps
give more. The rate falls to zero as a cosine.

The rate is a share of each parameter's root mean square. It decides more than the objective does: 1.4 % is right after
a poor pruning of a small model, and a real one that was pruned well learns nothing at 0.2 %. So it is chosen by short
runs with each of `SHARES`: the largest one with which the held-out loss falls by at least a third of what it falls with
the best one, because a long run gains more from a large rate than a short one. The state of least held-out loss is
kept; half of the steps without a new one end the training, and so does a loss that is not finite. Where no state is
better than the first, in the dtype of the files, the parameters get the values back that they had.

The held-out loss is the divergence from the teacher or, for an objective that reads none, the loss on the labels. Equal
inputs, seed and number of threads give equal bits. Several processes share the rows of each step and the held-out ones.
Their gradients and losses are summed, so all have the same weights: up to rounding, those of one process where all rows
have equal numbers of labels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.distributed.collectives import all_reduce_, shard, world
from billhook.distributed.torchrun import rank
from billhook.engine.batch import Batch, rows_of, select_rows, split_rows
from billhook.engine.restore import differentiable
from billhook.evaluation.predicting import predicted, row_losses, rows_at_once
from billhook.evaluation.scoring import Scoring
from billhook.recovery.masked_adam import MaskedAdam
from billhook.recovery.outputs import Predictor
from billhook.recovery.trained import Trained, are_sharded, give_, values_of

SHARES = (0.0003, 0.001, 0.003, 0.006, 0.014)  # of a parameter's root mean square, ascending
MEASURED = 5, 25  # the least and the most steps between two measurements of the held-out loss
RACE = 0.05  # of the steps, for each rate
LEAST_RACE = 8  # steps
Loss = Callable[[Predictor, Any, Batch], Tensor]  # an objective with its options
Progress = Callable[[str], None]  # called with the name of each finished step


@dataclass(frozen=True)
class TrainingSetup:
    """What is `trained` of `model`, on the rows of `batch`, `rows` of them in a step, for `steps` steps.

    `student` and `teacher` (None: there is none) give the outputs that the `objective` compares; `held_out` is the
    held-out loss of the model as it is now. `write(count, seed)` gives windows, int64 [count, length], that the
    student writes, where the objective reads them. `shares` are the rates that race, ascending. A rate falls to zero as
    a cosine or, after a number of steps in which it is reached, `warm`, as a line. `together` rows go through the
    models at a time, by default all of a step.
    """

    model: PreTrainedModel
    trained: Sequence[Trained]
    batch: Batch
    rows: int
    steps: int
    objective: Loss
    student: Predictor
    teacher: Predictor | None
    held_out: Callable[[], float]
    write: Callable[[int, int], Tensor] | None = None
    seed: int = 0
    shares: Sequence[float] = field(default_factory=lambda: SHARES)
    warm: int | None = None
    together: int | None = None

    @property
    def sharded(self) -> bool:
        """Whether every process has its own part of what is trained."""
        return are_sharded(self.trained)

    @property
    def measured_every(self) -> int:
        """Steps between two measurements of the held-out loss."""
        return min(MEASURED[1], max(MEASURED[0], self.steps // 10))

    @property
    def race_steps(self) -> int:
        """Steps of a race for each rate."""
        return min(self.steps, max(LEAST_RACE, round(RACE * self.steps)))

    def falling(self, step: int) -> float:
        """What part of the rate a step has."""
        if self.warm is None:
            return (1 + math.cos(math.pi * step / self.steps)) / 2
        return min((step + 1) / self.warm, (self.steps - step) / max(1, self.steps - self.warm), 1.0)

    def step_batch(self, step: int) -> Batch:
        """The rows of a step: all rows in random order, again and again in another one."""
        count, numbers = rows_of(self.batch), range(step * self.rows, (step + 1) * self.rows)
        epochs = {number // count for number in numbers}
        orders = {e: torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + e)) for e in epochs}
        return select_rows(self.batch, torch.stack([orders[number // count][number % count] for number in numbers]))

    def own_parts(self, batch: Batch) -> list[Batch]:
        """The parts of a step's batch that this process works on: every n-th row of n processes."""
        own = select_rows(batch, slice(rank(), None, world()))
        return split_rows(own, self.together or self.rows)

    def ended(self, state: "State") -> bool:
        """Whether a run ends, or ended before its last step."""
        return state.diverged or state.steps >= self.steps or 2 * (max(state.losses) - state.best) > self.steps


def best_share(before: float, losses: Mapping[float, float]) -> float:
    """The rate to train with, from the held-out loss `before` and those after the short runs of `race`."""
    most = before - min(losses.values())
    return max((share for share, loss in losses.items() if before - loss >= most / 3 > 0), default=min(losses))


@dataclass
class State:
    """How far a run is: the number of finished `steps`, held-out losses by step, the `best` of these steps, and whether
    a loss was not finite."""

    steps: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    best: int = 0
    diverged: bool = False

    def measured(self, loss: float) -> bool:
        """Add a held-out loss, and say whether it is the least so far."""
        self.losses[self.steps] = loss
        self.diverged = not math.isfinite(loss)
        better = loss < self.losses[self.best]
        self.best = self.steps if better else self.best
        return better


@dataclass(frozen=True)
class Recovered:
    """The held-out loss before and after, equal where nothing improved and the old values came back."""

    before: float
    after: float
    state: State


class Saved(NamedTuple):
    """What a stopped run goes on with: its state, the tensors of the optimizer, and the best values by parameter."""

    state: State
    optimizer: Mapping[str, Tensor]
    best: Mapping[str, Tensor]


def held_out_loss(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch, scoring: Scoring
) -> Callable[[], float]:
    """The function that gives the mean held-out loss over the rows of `batch`: the divergence of `model`, as it is when
    it is called, from the `teacher`, or without one its negative log-likelihood, in nats."""
    batches = split_rows(batch, rows_at_once(model, batch))
    own, last = shard(batches), batches[-1]
    count = sum(map(rows_of, own))
    batches = own + [last] * (math.ceil(len(batches) / world()) - len(own))  # sharded models are called equally often
    if teacher is None:
        return lambda: _mean(row_losses(model, batches, scoring)[:count])
    with torch.no_grad():
        known = [scoring.divergence.teacher(p) for b in batches for p, _ in predicted(teacher, b, scoring)]

    @torch.no_grad()
    def divergence() -> float:
        found = (outputs for b in batches for outputs, _ in predicted(model, b, scoring))
        each = [scoring.divergence.compare(outputs, t).mean for outputs, t in zip(found, known, strict=True)]
        return _mean(each[:count])

    return divergence


def _mean(values: Sequence[float]) -> float:
    """The mean over the values of all processes."""
    total, count = all_reduce_(torch.tensor([math.fsum(values), len(values)], dtype=torch.float64)).tolist()
    return float(total / count)


def race(setup: TrainingSetup, before: float, progress: Progress = lambda step: None) -> dict[float, float]:
    """The held-out loss after a short run with each of the rates, infinite where it diverged; the model, whose held-out
    loss is `before`, is as it was afterwards. Larger rates than one that does more harm than the best one does good are
    not tried."""
    short, start, found = replace(setup, steps=setup.race_steps), values_of(setup.trained), dict[float, float]()
    for share in setup.shares:
        adam = MaskedAdam(setup.trained)
        losses = []
        for loss in steps_(short, adam, share):
            losses.append(loss)
            progress(f"rate {share:.2%}")
        adam.close()
        held_out = setup.held_out() if math.isfinite(losses[-1]) else math.nan
        found[share] = held_out if math.isfinite(held_out) else math.inf
        give_(setup.trained, start)
        if len(found) > 1 and found[share] - before > before - min(found.values()):
            break
    return found


def train_(
    setup: TrainingSetup,
    share: float,
    *,
    saved: Saved | None = None,
    save: Callable[[Saved], None] = lambda saved: None,
    progress: Progress = lambda step: None,
) -> Recovered:
    """Train the model in place from its present values, or go on with what was `saved`.

    `save` is called after every measurement; what it raises ends the run.
    """
    start = values_of(setup.trained)
    before = setup.held_out() if saved is None else saved.state.losses[0]
    state, best = (State(losses={0: before}), start) if saved is None else (saved.state, dict(saved.best))
    adam = MaskedAdam(setup.trained)
    if saved is not None:
        adam.load_(saved.optimizer)
    for loss in () if setup.ended(state) else steps_(setup, adam, share, state.steps):
        state.steps += 1
        progress(f"step {state.steps}")
        state.diverged = not math.isfinite(loss)
        if not state.diverged and (state.steps % setup.measured_every == 0 or state.steps == setup.steps):
            best = adam.values() if state.measured(setup.held_out()) else best
            save(Saved(state, adam.state(), best))
        if setup.ended(state):
            break
    adam.close()
    give_(setup.trained, {k.name: best[k.name].to(k.stored) for k in setup.trained})
    after = setup.held_out()
    if after < before:
        return Recovered(before, after, state)
    give_(setup.trained, start)
    return Recovered(before, before, state)


def steps_(setup: TrainingSetup, adam: MaskedAdam, share: float, done: int = 0) -> Iterator[float]:
    """Do the steps after the first `done`, and yield the loss of each; one that is not finite changes nothing, and is
    the last."""
    parameters, written = [k.parameter for k in setup.trained], list[Tensor]()
    for step in range(done, setup.steps):
        batch = setup.step_batch(step)
        if setup.write is not None:
            if step % setup.measured_every == 0:  # where a run goes on, so that it has the same windows
                several = setup.write(setup.rows * setup.measured_every, setup.seed + 1 + step)
                written = list(several.split(setup.rows))
            batch = {**batch, "written": written[step % setup.measured_every]}
        value = 0.0
        with torch.enable_grad(), differentiable(parameters, setup.model.parameters()):
            for part in setup.own_parts(batch):
                loss = setup.objective(setup.student, setup.teacher, part) * (rows_of(part) / setup.rows)
                loss.backward()
                value += float(loss.detach())
        value = float(all_reduce_(torch.tensor(value, dtype=torch.float64)))
        adam.share_gradients_()
        if math.isfinite(value):
            adam.step(share * setup.falling(step))
        yield value
        if not math.isfinite(value):
            return
