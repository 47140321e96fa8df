"""image-text-to-text: vision-language models such as LLaVA, scored by their answers to questions about images.

The decoder alone is pruned by default, as in the literature; `--stacks` chooses the vision tower or all stacks. A score
is the exact match, the fraction of questions for which the model's most likely tokens are those of the answer
(generating them greedily gives the same), and the likelihood of the answer. What was lost is measured on the answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.config import call_options
from billhook.engine.batch import LABELS, Batch, as_batches, join_rows, main_input, model_inputs, select_rows
from billhook.errors import BillhookError
from billhook.evaluation.divergence import KL, Divergence
from billhook.evaluation.scoring import IGNORED
from billhook.images.pixels import GIVEN, digest, drawn
from billhook.tasks.base import Drawing, Home, Progress, Samples
from billhook.tasks.question_inputs import Questions


@dataclass(frozen=True)
class ImageTextToText:
    """A batch is what the processor makes of images and text, and "labels": the answer's tokens, -100 elsewhere."""

    protocol: ClassVar[str] = "answers to questions about images, by the checkpoint's own processor and chat template"
    unit: ClassVar[str] = "answer"
    divergence: ClassVar[Divergence] = KL
    stacks: ClassVar[str] = "language"
    name: str = "image-text-to-text"
    auto_class: str = "AutoModelForImageTextToText"

    def samples(
        self, source: Any, model: PreTrainedModel, home: Home, drawing: Drawing, progress: Progress = lambda step: None
    ) -> Samples:
        """Questions of a SOURCE (`billhook.images.questions`) at random, or batches that are given."""
        if drawing.length is not None or drawing.bos != "auto":
            raise BillhookError("Questions are no windows of tokens: leave out --length and --bos.")
        given = list(source) if isinstance(source, list | tuple) else [source]
        if given and all(isinstance(one, Tensor) or _is_batch(one) for one in given):
            batch = join_rows(as_batches(model, given))
            return Samples(batch, GIVEN, digest(main_input(model, batch)), "given")
        found = Questions.of(source, model, home, "calibration")
        how: dict[str, Any] = {"again": drawing.sampling == "papers", "what": "questions"}
        samples = min(drawing.samples, len(found.found)) if drawing.fewer else drawing.samples
        numbers = drawn(found.found, samples, drawing.held_out, drawing.seed, found.source, **how)
        batch = found.batch(numbers)
        own, more = (select_rows(batch, part) for part in (slice(0, samples), slice(samples, None)))
        heldout = more if len(numbers) > samples else None
        return Samples(own, found.source, digest(main_input(model, own)), drawing.sampling, None, heldout)

    def inputs(self, source: Any, model: PreTrainedModel, home: Home) -> Questions:
        """The questions of a SOURCE that are scored."""
        return Questions.of(source, model, home, "evaluation")

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for token ids int64 [rows, length] without images."""
        return {"input_ids": inputs}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [rows, length - 1, vocabulary] and the tokens that they predict, -100 outside the answer."""
        return logits[:, :-1], _labels(batch)[:, 1:].to(logits.device)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The mean negative log-likelihood of the tokens of the answer, by the model's own loss function."""
        inputs = {**model_inputs(model, batch), LABELS: _labels(batch).to(model.device)}
        loss: Tensor = model(**inputs, **call_options(model)).loss
        return loss


def _is_batch(given: Any) -> bool:
    return isinstance(given, Mapping) and isinstance(given.get("input_ids"), Tensor)


def _labels(batch: Batch) -> Tensor:
    labels = batch.get(LABELS)
    if labels is None or bool((labels == IGNORED).all()):
        raise BillhookError("The questions have no answers, and scores and losses are those of the answers.")
    return labels


TASK = ImageTextToText()
