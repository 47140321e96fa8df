"""Model inputs for questions about pictures, by the processor and the chat template of the checkpoint.

A row is the prompt, as the model reads it before it generates, followed by the tokens of the answer, which are its
labels; the token that ends the answer is not one of them. With a chat template the prompt is the template's; without
one it is the question, after the processor's image token where it has one.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.engine.batch import LABELS
from billhook.errors import BillhookError, first_line
from billhook.evaluation.scoring import IGNORED
from billhook.images.corpus import readable
from billhook.images.pixels import processor_of
from billhook.images.questions import Question, questions
from billhook.tasks.base import Home
from billhook.tasks.read_rows import ReadRows, source_of

_TOKENS = "input_ids"


@dataclass(frozen=True)
class QuestionReader:
    """Makes a batch of one row of a question; `keys` are the arguments of the model."""

    processor: Any
    keys: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel, home: Home, source: str) -> "QuestionReader":
        """The reader of a model directory; raises BillhookError where it has no processor, or one that cannot be
        loaded."""
        directory = home.directory_of(model)
        processor = processor_of(directory, home.trust_remote_code, source, "AutoProcessor")
        if getattr(processor, "tokenizer", None) is None:
            raise BillhookError(f"The processor of {directory} reads images alone: its tokenizer is missing.")
        return cls(processor, frozenset(inspect.signature(model.forward).parameters))

    def row(self, question: Question) -> dict[str, Tensor]:
        """The inputs and labels of a question with its answer."""
        prompt, answer = self._texts(question)
        inputs = self.prompt(prompt, question)
        added = torch.tensor([self._answer_ids(prompt, answer)])
        length = inputs[_TOKENS].shape[1]
        row = {name: _extended(value, length, added.shape[1]) for name, value in inputs.items()}
        row[_TOKENS] = torch.cat([inputs[_TOKENS], added], 1)
        row[LABELS] = torch.cat([torch.full((1, length), IGNORED), added], 1)
        return row

    def prompt(self, text: str, question: Question) -> dict[str, Tensor]:
        """The inputs of a prompt with its pictures; raises BillhookError where the processor cannot read them."""
        images = [picture.load() for picture in question.pictures]
        try:
            found = self.processor(images=images, text=text, return_tensors="pt")
        except (ValueError, TypeError, KeyError, RuntimeError, IndexError) as error:
            why = first_line(error)
            raise BillhookError(f"{question.name}: the model's processor cannot read it ({why}).") from None
        tensors = {key: value for key, value in found.items() if key in self.keys and isinstance(value, Tensor)}
        return {_TOKENS: tensors.pop(_TOKENS).long(), **tensors}

    def prompt_text(self, question: Question) -> str:
        """The text of a question as the model reads it."""
        if getattr(self.processor, "chat_template", None):
            return self._rendered(question.messages, question.name, add_generation_prompt=True)
        if len(question.messages) > 1:
            raise BillhookError(f"{question.name} has several messages, and the model has no chat template.")
        token = getattr(self.processor, "image_token", None) or ""
        return str(token) * len(question.pictures) + question.text

    def _texts(self, question: Question) -> tuple[str, str]:
        """The prompt, and the answer with the space before it, as in the template."""
        prompt, answer = self.prompt_text(question), question.answer
        if not getattr(self.processor, "chat_template", None):
            return prompt, f" {answer}"
        last = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = self._rendered([*question.messages, last], question.name)
        at = whole.find(answer.strip(), len(prompt)) if whole.startswith(prompt) else -1
        return prompt, answer if at < 0 else whole[len(prompt) : at] + answer.strip()

    def _rendered(self, messages: list[dict[str, Any]], name: str, **options: Any) -> str:
        try:
            return str(self.processor.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # of a template, which is a program of its own
            why = first_line(error)
            raise BillhookError(f"{name}: the model's chat template cannot be applied ({why}).") from None

    def _answer_ids(self, prompt: str, answer: str) -> list[int]:
        """The tokens of an answer after a prompt; on their own where a token would span both."""
        tokenizer = self.processor.tokenizer
        before, whole = (tokenizer(text, verbose=False)[_TOKENS] for text in (prompt, prompt + answer))
        if whole[: len(before)] == before and len(whole) > len(before):
            return list(whole[len(before) :])
        return list(tokenizer(answer, add_special_tokens=False, verbose=False)[_TOKENS])


def prompt_inputs(model: PreTrainedModel, home: Home, files: Sequence[Path], text: str) -> dict[str, Tensor]:
    """The inputs of a question about image files, as the model reads it before it answers.

    Raises BillhookError for a file that is no image, and as `QuestionReader` does.
    """
    reader = QuestionReader.of(model, home, str(files[0]))
    row = {"image": [path.expanduser().absolute() for path in files], "question": text, "answer": "-"}
    question = questions([row], "the prompt")[0]
    return reader.prompt(reader.prompt_text(question), question)


def _extended(value: Tensor, length: int, more: int) -> Tensor:
    """A tensor [1, length, ...] of one value a token with the last one repeated `more` times; others as they are."""
    if value.ndim < 2 or value.shape[:2] != (1, length):
        return value
    return torch.cat([value, value[:, -1:].expand(-1, more, *value.shape[2:])], 1)


def question_rows(source: Any, model: PreTrainedModel, home: Home, purpose: str) -> ReadRows:
    """The questions of a SOURCE; raises BillhookError as `billhook.images.questions` does."""
    name, every = source_of(source), questions(source, purpose)
    found = readable(every, lambda question: question.pictures, name) if home.skip_unreadable else every
    return ReadRows(name, found, QuestionReader.of(model, home, name).row, len(every) - len(found))
