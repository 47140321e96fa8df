"""text2text-generation: encoder-decoder language models such as T5 and BART, scored by the target of each input.

Encoder and decoder are two stacks; both are pruned by default (`--stacks encoder` or `decoder` chooses one). A score is
the exact match, the fraction of inputs for which every token of the target is the most likely one, and the likelihood
of the target. The token that ends the target is one of its tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.config import call_options
from billhook.engine.batch import LABELS, Batch, model_inputs
from billhook.errors import BillhookError
from billhook.evaluation.divergence import KL, Divergence
from billhook.tasks.base import Drawing, Home, Inputs, Progress, Samples
from billhook.tasks.read_rows import ReadRows, answers, given_samples, source_of
from billhook.tasks.token_windows import tokenizer_of
from billhook.text.objects import Row, objects

FORMS = 'FILE.jsonl with lines {"input": TEXT, "target": TEXT}, or hub:NAME[:config][:split] with these columns'


@dataclass(frozen=True)
class TextToText:
    """A batch is {"input_ids": ..., "decoder_input_ids": ..., "labels": the tokens of the target}."""

    protocol: ClassVar[str] = "target of each input, by the checkpoint's own tokenizer"
    unit: ClassVar[str] = "answer"
    divergence: ClassVar[Divergence] = KL
    stacks: ClassVar[str] = "all"
    encoder_decoder: ClassVar[bool] = True
    name: str = "text2text-generation"
    auto_class: str = "AutoModelForSeq2SeqLM"

    def samples(
        self, source: Any, model: PreTrainedModel, home: Home, drawing: Drawing, progress: Progress = lambda step: None
    ) -> Samples:
        """Rows of a SOURCE at random, or batches that are given."""
        given = given_samples(source, model, drawing)
        return given or self._rows(source, model, home, "calibration").samples(model, drawing, "rows")

    def inputs(self, source: Any, model: PreTrainedModel, home: Home) -> Inputs:
        """The rows of a SOURCE that are scored."""
        return self._rows(source, model, home, "evaluation")

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for token ids int64 [rows, length] without targets."""
        start = torch.zeros((len(inputs), 1), dtype=torch.int64)
        return {"input_ids": inputs, "decoder_input_ids": start}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [rows, length, vocabulary] and the tokens of the targets."""
        return logits, answers(batch).to(logits.device)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The mean negative log-likelihood of the tokens of the targets, by the model's own loss function."""
        inputs = {**model_inputs(model, batch), LABELS: answers(batch).to(model.device)}
        loss: Tensor = model(**inputs, **call_options(model)).loss
        return loss

    def _rows(self, source: Any, model: PreTrainedModel, home: Home, purpose: str) -> ReadRows:
        name, tokenizer = source_of(source), tokenizer_of(model, home)
        if tokenizer is None:
            raise BillhookError(f"The model has no tokenizer to read {name} with.")

        def read(row: Row) -> Batch:
            ids = tokenizer(row.text("input"), return_tensors="pt")["input_ids"]
            target = tokenizer(text_target=row.text("target"))["input_ids"]
            return {"input_ids": ids, **shifted(model, target)}

        return ReadRows(name, objects(source, purpose, FORMS), read)


def shifted(model: PreTrainedModel, target: list[int]) -> dict[str, Tensor]:
    """The labels [1, length] of a target, and the decoder's inputs: the same after the start token."""
    start = model.config.decoder_start_token_id
    if start is None:
        raise BillhookError("The model names no decoder_start_token_id: add it to config.json.")
    labels = torch.tensor([target[1:] if target[:1] == [start] else target])
    return {"decoder_input_ids": torch.cat([torch.tensor([[start]]), labels[:, :-1]], 1), LABELS: labels}


TASK = TextToText()
