"""image-text-to-text: vision-language models such as LLaVA, scored by their answers to questions about images.

The decoder alone is pruned by default, as in the literature; `--stacks` chooses the vision tower or all stacks. A score
is the exact match, the fraction of questions for which the model's most likely tokens are those of the answer
(generating them greedily gives the same), and the likelihood of the answer. What was lost is measured on the answers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from billhook.engine.batch import Batch
from billhook.tasks.base import Home
from billhook.tasks.question_inputs import question_rows
from billhook.tasks.read_rows import AnswerTask, ReadRows, answers


@dataclass(frozen=True)
class ImageTextToText(AnswerTask):
    """A batch is what the processor makes of images and text, and "labels": the answer's tokens, -100 elsewhere."""

    protocol: ClassVar[str] = "answers to questions about images, by the checkpoint's own processor and chat template"
    stacks: ClassVar[str] = "language"
    continues_text: ClassVar[bool] = True
    rows: ClassVar[str] = "questions"
    name: str = "image-text-to-text"
    auto_class: str = "AutoModelForImageTextToText"

    def read(self, source: Any, model: PreTrainedModel, home: Home, purpose: str) -> ReadRows:
        """The questions of a SOURCE (`billhook.images.questions`)."""
        return question_rows(source, model, home, purpose)

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for token ids int64 [rows, length] without images."""
        return {"input_ids": inputs}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [rows, length - 1, vocabulary] and the tokens that they predict, -100 outside the answer."""
        return logits[:, :-1], answers(batch)[:, 1:].to(logits.device)


TASK = ImageTextToText()
