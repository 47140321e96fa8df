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

from billhook.engine.batch import LABELS, Batch, main_input
from billhook.errors import BillhookError
from billhook.tasks.base import Home
from billhook.tasks.read_rows import AnswerTask, ReadRows, answers, source_of
from billhook.tasks.token_windows import tokenizer_of
from billhook.text.objects import DataRow, objects, without_nulls

FORMS = 'FILE.jsonl with lines {"input": TEXT, "target": TEXT}, or hub:NAME[:config][:split] with these columns'


@dataclass(frozen=True)
class TextToText(AnswerTask):
    """A batch is {"input_ids": ..., "decoder_input_ids": ..., "labels": the tokens of the target}."""

    protocol: ClassVar[str] = "target of each input, by the checkpoint's own tokenizer"
    stacks: ClassVar[str] = "all"
    continues_text: ClassVar[bool] = True
    encoder_decoder: ClassVar[bool] = True
    name: str = "text2text-generation"
    auto_class: str = "AutoModelForSeq2SeqLM"

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for token ids int64 [rows, length] without targets."""
        start = torch.zeros((len(inputs), 1), dtype=torch.int64)
        return {"input_ids": inputs, "decoder_input_ids": start}

    def completed(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """A batch that is given, with the decoder's inputs: the labels, else the token ids, after the start token.

        Raises BillhookError for a model that names no start token.
        """
        if "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
            return batch
        tokens = batch.get(LABELS, main_input(model, batch))
        tokens = tokens.clamp(min=0) if tokens.ndim == 2 else tokens.new_zeros((len(tokens), 1), dtype=torch.int64)
        start = torch.full_like(tokens[:, :1], start_token(model))
        return {**batch, "decoder_input_ids": torch.cat([start, tokens[:, :-1]], 1)}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [rows, length, vocabulary] and the tokens of the targets."""
        return logits, answers(batch).to(logits.device)

    def read(self, source: Any, model: PreTrainedModel, home: Home, purpose: str) -> ReadRows:
        """The rows of a SOURCE."""
        name, tokenizer = source_of(source), tokenizer_of(model, home)
        if tokenizer is None:
            raise BillhookError(f"The model has no tokenizer to read {name} with.")

        def pair(row: DataRow) -> Batch:
            ids = tokenizer(row.text("input"), return_tensors="pt")["input_ids"]
            target = tokenizer(text_target=row.text("target"))["input_ids"]
            return {"input_ids": ids, **shifted(model, target)}

        return ReadRows(name, without_nulls(objects(source, purpose, FORMS), ("input", "target"), name), pair)


def start_token(model: PreTrainedModel) -> int:
    """The decoder's start token, or, in the configuration of a decoder of its own (T5Gemma), its BOS token; raises
    BillhookError where config.json names none."""
    config = model.config
    start: int | None = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(getattr(config, "decoder", None), "bos_token_id", None)
    if start is None:
        raise BillhookError("The model names no decoder_start_token_id: add it to config.json.")
    return start


def shifted(model: PreTrainedModel, target: list[int]) -> dict[str, Tensor]:
    """The labels [1, length] of a target, and the decoder's inputs: the same after the start token."""
    start = start_token(model)
    labels = torch.tensor([target[1:] if target[:1] == [start] else target])
    return {"decoder_input_ids": torch.cat([torch.tensor([[start]]), labels[:, :-1]], 1), LABELS: labels}


TASK = TextToText()
