"""text-generation: decoder-only language models, scored by the next token."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from billhook.architectures.config import call_options, vocabulary_size
from billhook.engine.batch import Batch, model_inputs
from billhook.evaluation.scoring import NextToken, Scoring
from billhook.tasks.base import Drawing, Progress, Samples
from billhook.tasks.self_text import is_self, self_windows
from billhook.tasks.token_windows import as_tensor, drawn_windows, given_windows, tokenizer_of
from billhook.text.windows import Windows, load_windows


@dataclass(frozen=True)
class TextGeneration(NextToken):
    """A batch is {"input_ids": int64 [windows, length]}; every token but the first of a window is a label."""

    name: str = "text-generation"
    auto_class: str = "AutoModelForCausalLM"

    def samples(
        self,
        source: Any,
        model: PreTrainedModel,
        home: Path | None,
        drawing: Drawing,
        *,
        trust_remote_code: bool = False,
        progress: Progress = lambda step: None,
    ) -> Samples:
        """Token windows of a SOURCE (`billhook.text.windows`), also of text that the model writes itself ("self:")."""
        if as_tensor(source) is not None:
            tokens = given_windows(source, model)
        else:
            tokenizer = tokenizer_of(model, home, trust_remote_code=trust_remote_code)
            if is_self(str(source)):
                tokens = self_windows(str(source), tokenizer, model, drawing, progress)
            else:
                tokens = drawn_windows(str(source), tokenizer, model, drawing)
        return Samples(self.batch(tokens.ids), tokens.source, tokens.digest, tokens.sampling)

    def evaluation(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase | None,
        model: PreTrainedModel,
        length: int,
        limit: int | None = None,
    ) -> tuple[Windows, Scoring]:
        """Non-overlapping windows of a SOURCE, and how they are scored."""
        return load_windows(source, tokenizer, length=length, limit=limit, vocab_size=vocabulary_size(model)), self

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The mean negative log-likelihood of a window's tokens, by the model's own loss function."""
        inputs = model_inputs(model, batch)
        loss: Tensor = model(**inputs, labels=inputs["input_ids"], **call_options(model)).loss
        return loss


TASK = TextGeneration()
