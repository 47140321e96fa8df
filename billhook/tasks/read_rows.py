"""Rows of a SOURCE that are read one by one, each a batch of its own, for tasks that predict an answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.config import call_options
from billhook.engine.batch import LABELS, Batch, as_batches, join_rows, main_input, model_inputs
from billhook.errors import BillhookError
from billhook.evaluation.divergence import KL, Divergence
from billhook.evaluation.scoring import IGNORED
from billhook.images.pixels import GIVEN, digest, drawn
from billhook.tasks.base import Drawing, Home, Inputs, Progress, Samples


@dataclass(frozen=True)
class ReadRows:
    """What was `found` in a SOURCE, and the function that makes a batch of one row of it; `skipped` more cannot be
    read."""

    source: str
    found: Sequence[Any]
    read: Callable[[Any], Batch]
    skipped: int = 0

    def batches(self, limit: int | None) -> Iterator[Batch]:
        """One row a batch, so that nothing is padded."""
        for one in self.found[:limit]:
            yield self.read(one)

    def samples(self, model: PreTrainedModel, drawing: Drawing, what: str) -> Samples:
        """Rows at random, and more of them that are held out."""
        samples, again = drawing.samples_of(len(self.found)), drawing.sampling == "papers"
        numbers = drawn(self.found, samples, drawing.held_out, drawing.seed, self.source, again=again, what=what)
        batch = join_rows(self.read(self.found[n]) for n in numbers)
        return Samples.split(batch, samples, model, self.source, drawing.sampling, skipped=self.skipped)


class AnswerTask(ABC):
    """What tasks share that predict an answer; their batches have its tokens as labels, -100 elsewhere."""

    unit: ClassVar[str] = "answer"
    divergence: ClassVar[Divergence] = KL
    rows: ClassVar[str] = "rows"

    def samples(
        self, source: Any, model: PreTrainedModel, home: Home, drawing: Drawing, progress: Progress = lambda step: None
    ) -> Samples:
        """Rows of a SOURCE at random, or batches that are given."""
        given = given_samples(source, model, drawing, self.completed)
        return given or self.read(source, model, home, "calibration").samples(model, drawing, self.rows)

    def inputs(self, source: Any, model: PreTrainedModel, home: Home) -> Inputs:
        """The rows of a SOURCE that are scored."""
        return self.read(source, model, home, "evaluation")

    def completed(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """A batch that is given, with inputs that the model needs and the batch lacks."""
        return batch

    @abstractmethod
    def read(self, source: Any, model: PreTrainedModel, home: Home, purpose: str) -> ReadRows:
        """The rows of a SOURCE; `purpose` is calibration or evaluation."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The mean negative log-likelihood of the tokens of the answers, by the model's own loss function."""
        inputs = {**model_inputs(model, batch), LABELS: answers(batch).to(model.device)}
        loss: Tensor = model(**inputs, **call_options(model)).loss
        return loss


def source_of(source: Any) -> str:
    """The name of a SOURCE."""
    return str(source) if isinstance(source, str | Path) else "given rows"


def given_samples(
    source: Any, model: PreTrainedModel, drawing: Drawing, completed: Callable[[PreTrainedModel, Batch], Batch]
) -> Samples | None:
    """The samples where batches of tensors (or token ids) are given from Python, `completed`; None for another source.

    Raises BillhookError for options that only windows of text have.
    """
    if drawing.length is not None or drawing.bos != "auto":
        raise BillhookError("Rows with answers are no windows of tokens: leave out --length and --bos.")
    given = list(source) if isinstance(source, list | tuple) else [source]
    if not given or not all(isinstance(one, Tensor) or _is_batch(model, one) for one in given):
        return None
    batch = join_rows(completed(model, one) for one in as_batches(model, given))
    return Samples(batch, GIVEN, digest(main_input(model, batch)), "given")


def _is_batch(model: PreTrainedModel, given: Any) -> bool:
    return isinstance(given, Mapping) and isinstance(given.get(model.main_input_name, given.get("input_ids")), Tensor)


def answers(batch: Batch) -> Tensor:
    """The labels of a batch; raises BillhookError where there are none."""
    labels = batch.get(LABELS)
    if labels is None or bool((labels == IGNORED).all()):
        raise BillhookError("The rows have no answers, and scores and losses are those of the answers.")
    return labels
