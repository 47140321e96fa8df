"""Trials: a model is pruned in full by one plan after another, and scored on held-out windows.

The scores are the divergence from the dense model's predictions (`billhook.evaluation.divergence`; of text, KL with a
`TopKTeacher`, in nats a token) and the negative log-likelihood of the labels.
"""

import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.layers import Layer
from billhook.distributed.collectives import gather
from billhook.engine.batch import Batch, select_rows, split_rows
from billhook.engine.gradient_file import Gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.loop import LayerResult, apply_plan_
from billhook.engine.method import WeightMethod
from billhook.engine.restore import restore_, restored
from billhook.errors import JobError
from billhook.evaluation.divergence import Divergence
from billhook.evaluation.predicting import predicted, row_nll, rows_at_once
from billhook.images.labels import UNKNOWN
from billhook.plan.plan import Plan
from billhook.tasks.opening import task_of
from billhook.trials.attribution import attribute


@dataclass(frozen=True)
class Losses:
    """Of each window, in the unit of the task (`billhook.evaluation.scoring.measured`): the divergence `kl` from the
    dense model, and `nll` of the text; 0 where it has no labels."""

    kl: list[float]
    nll: list[float]


class Runner(ABC):
    """Makes a model smaller by one plan after another and scores it; a context that restores the weights of `layers`.

    Entering it records the dense model's predictions on the held-out windows and, for a method that reads them, its
    gradients. A copy of the dense weights is in memory meanwhile. In a run of several processes the plans and scores of
    the first one count, because sums differ in their last bits.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[Layer], batches: Sequence[Batch], heldout: Batch, gradient: str
    ) -> None:
        """`batches` are the calibration samples of trials, `heldout` the rows on which they are scored.

        `gradient` is the statistic of gradients that trials read, or an empty string.
        """
        self.model, self.task, self.layers, self.gradient = model, task_of(model), list(layers), gradient
        self.batches, self.heldout = list(batches), heldout
        self.dense_gradients: Gradients | None = None
        self._teachers: list[Any] = []  # of each held-out row
        self._stack = ExitStack()

    @torch.no_grad()
    def __enter__(self) -> Self:
        statistic = self.gradient
        with ExitStack() as stack:
            if statistic:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="billhook."))) / "g.safetensors"
                self.dense_gradients = compute_gradients(
                    self.model, self.batches, statistic, path, loss=self.task.loss, layers=self.layers
                )
            teacher = self.task.divergence.teacher
            self._teachers = [teacher(outputs) for outputs, _ in self.predictions(self.heldout)]
            self._dense = stack.enter_context(restored(self.layers))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def restore_(self) -> None:
        """Put the dense weights back."""
        restore_(self.layers, self._dense)

    @abstractmethod
    def prune(self, plan: Plan) -> list[LayerResult]:
        """Apply a plan to the dense model in place."""

    @torch.no_grad()
    def losses(self, first: int, last: int) -> Losses:
        """Score the model as it is now on held-out rows `first` to `last` (exclusive).

        Raises JobError for a loss that is not finite.
        """
        kl, nll = [], []
        rows = select_rows(self.heldout, slice(first, last))
        for row, (logits, labels) in enumerate(self.predictions(rows), start=first):
            kl.append(self.task.divergence.compare(logits, self._teachers[row]).mean)
            nll.append(0.0 if bool((labels == UNKNOWN).any()) else row_nll(logits, labels))
            if not math.isfinite(kl[-1] + nll[-1]):
                raise JobError(f"The pruned model's loss on held-out row {row} is not finite. Try --dtype float32.")
        return gather(Losses(kl, nll))[0]

    def attribute(self) -> dict[str, float]:
        """Each layer's share of the divergence of the model as it is now (`billhook.trials.attribution`)."""
        gradients = self.gradients(self._teachers)
        found = attribute(self.model, self.layers, self._dense, self.heldout, self.task, gradients)
        return gather(found)[0]

    def gradients(self, teachers: Sequence[Any]) -> dict[int, Callable[[Tensor], Tensor]]:
        """The gradient of the divergence from each teacher by a row's outputs, for `billhook.trials.attribution`."""
        return {row: partial(_gradient, self.task.divergence, teacher) for row, teacher in enumerate(teachers)}

    @torch.no_grad()
    def predictions(self, rows: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each row the scored logits [tokens, vocabulary] of the model as it is now, and their labels [tokens]."""
        for batch in split_rows(rows, rows_at_once(self.model, rows)):
            with evaluating(self.model):
                yield from predicted(self.model, batch, self.task)


class TrialRunner(Runner):
    """Prunes the weights of layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[Layer],
        batches: Sequence[Batch],
        heldout: Batch,
        method: WeightMethod,
    ) -> None:
        """`method` is how trials prune; the others as of `Runner`."""
        super().__init__(model, layers, batches, heldout, method.gradient)
        self.method = method

    def prune(self, plan: Plan) -> list[LayerResult]:
        """Prune the dense model in place as `billhook prune` does."""
        self.restore_()
        return apply_plan_(
            self.model, gather(plan)[0], self.method, self.batches, layers=self.layers, gradients=self.dense_gradients
        )


def _gradient(divergence: Divergence, teacher: Any, outputs: Tensor) -> Tensor:
    return divergence.gradient(outputs, teacher)
