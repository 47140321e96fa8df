"""fill-mask: encoders such as BERT, scored by the tokens at masked positions.

A window is [CLS], tokens of the text, [SEP]. A fraction of 15 % of its tokens (BERT, Devlin et al. 2019,
arXiv:1810.04805), chosen with a fixed seed, is replaced by the mask token and is to be predicted; all other positions
have the label -100. Without a tokenizer (token ids for a model in memory) nothing is masked, which is sufficient for
criteria that only read activations.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.architectures.config import call_options, vocabulary_size
from billhook.engine.batch import LABELS, Batch, model_inputs
from billhook.errors import BillhookError
from billhook.evaluation.divergence import KL, Divergence
from billhook.evaluation.scoring import IGNORED, Scoring
from billhook.tasks.base import Drawing, Home, Progress, Samples
from billhook.tasks.token_windows import drawn_windows, framed, tokenizer_of
from billhook.text.windows import Windows, load_windows

MASKED = 0.15


@dataclass(frozen=True)
class FillMask:
    """A batch is {"input_ids": ids with mask tokens, "labels": the tokens at masked positions, -100 elsewhere}."""

    protocol: ClassVar[str] = "perplexity of masked tokens (15 %, fixed seed) over non-overlapping windows"
    unit: ClassVar[str] = "token"
    divergence: ClassVar[Divergence] = KL
    stacks: ClassVar[str] = "all"
    name: str = "fill-mask"
    auto_class: str = "AutoModelForMaskedLM"
    mask_token: int | None = None
    special: frozenset[int] = frozenset()

    def with_tokenizer(self, tokenizer: Tokenizer | None) -> "FillMask":
        """The task with the special tokens of a tokenizer."""
        if tokenizer is None or tokenizer.mask_token_id is None:
            return self
        return replace(self, mask_token=tokenizer.mask_token_id, special=frozenset(tokenizer.all_special_ids))

    def samples(
        self, source: Any, model: PreTrainedModel, home: Home, drawing: Drawing, progress: Progress = lambda step: None
    ) -> Samples:
        """Masked token windows of a SOURCE (`billhook.text.windows`)."""
        tokenizer = tokenizer_of(model, home)
        task = self.with_tokenizer(tokenizer)
        tokens = drawn_windows(source, tokenizer, model, replace(drawing, bos=_frame(drawing.bos)), reserved=2)
        if tokens.sampling == "given":
            return Samples.of(task.batch, tokens)
        return Samples.of(lambda ids: task.batch(framed(ids, tokenizer)), tokens)

    def batch(self, inputs: Tensor) -> Batch:
        """Inputs and labels for token ids int64 [windows, length]; the ids alone without a mask token."""
        ids = inputs
        if self.mask_token is None:
            return {"input_ids": ids}
        allowed = ~torch.isin(ids, torch.tensor(sorted(self.special), dtype=ids.dtype))
        chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < MASKED) & allowed
        labels = torch.where(chosen, ids, IGNORED)
        return {"input_ids": torch.where(chosen, self.mask_token, ids), LABELS: labels}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """All logits [windows, length, vocabulary] and the labels."""
        return logits, self._labels(batch)

    def evaluation(
        self,
        source: str,
        tokenizer: Tokenizer | None,
        model: PreTrainedModel,
        length: int,
        limit: int | None = None,
        *,
        bos: str = "auto",
    ) -> tuple[Windows, Scoring]:
        """Non-overlapping windows of a SOURCE between [CLS] and [SEP], and the scoring of their masked tokens.

        Raises BillhookError for a tokenizer without a mask token.
        """
        task = self.with_tokenizer(tokenizer)
        if tokenizer is None or task.mask_token is None:
            raise BillhookError("Masked tokens cannot be scored: the model has no tokenizer with a mask token.")
        windows = load_windows(
            source, tokenizer, length=length - 2, limit=limit, bos=_frame(bos), vocab_size=vocabulary_size(model)
        )
        return replace(windows, ids=framed(windows.ids, tokenizer), text_bytes=None), task

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The mean negative log-likelihood of the masked tokens, by the model's own loss function."""
        labels = self._labels(batch).to(model.device)
        loss: Tensor = model(**model_inputs(model, batch), labels=labels, **call_options(model)).loss
        return loss

    def _labels(self, batch: Batch) -> Tensor:
        if LABELS not in batch:
            raise BillhookError(
                "Nothing is masked, so there is no loss: add the tokenizer to the model's directory, or take a method "
                "that reads activations only, such as admm with the uniform allocation."
            )
        return batch[LABELS]


def _frame(bos: str) -> str:
    """No BOS token between [CLS] and [SEP]; raises BillhookError where one is asked for."""
    if bos == "yes":
        raise BillhookError("The windows of an encoder begin with its [CLS] token: leave out --bos.")
    return "no"


TASK = FillMask()
