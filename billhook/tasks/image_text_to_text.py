"""image-text-to-text: vision-language models such as LLaVA, scored by their answers to questions about images.

The decoder alone is pruned by default, as in the literature; `--stacks` chooses the vision tower or all stacks. A score
is the exact match, the fraction of questions for which the model's most likely tokens are those of the answer
(generating them greedily gives the same), and the likelihood of the answer. What was lost is measured on the answers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.config import call_options
from billhook.engine.batch import LABELS, Batch, model_inputs
from billhook.evaluation.divergence import KL, Divergence
from billhook.tasks.base import Drawing, Home, Inputs, Progress, Samples
from billhook.tasks.question_inputs import question_rows
from billhook.tasks.read_rows import answers, given_samples


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
        given = given_samples(source, model, drawing)
        return given or question_rows(source, model, home, "calibration").samples(model, drawing, "questions")

    def inputs(self, source: Any, model: PreTrainedModel, home: Home) -> Inputs:
        """The questions of a SOURCE that are scored."""
        return question_rows(source, model, home, "evaluation")

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for token ids int64 [rows, length] without images."""
        return {"input_ids": inputs}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [rows, length - 1, vocabulary] and the tokens that they predict, -100 outside the answer."""
        return logits[:, :-1], answers(batch)[:, 1:].to(logits.device)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The mean negative log-likelihood of the tokens of the answer, by the model's own loss function."""
        inputs = {**model_inputs(model, batch), LABELS: answers(batch).to(model.device)}
        loss: Tensor = model(**inputs, **call_options(model)).loss
        return loss


TASK = ImageTextToText()
