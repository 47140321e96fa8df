"""feature-extraction: models without a head (DINOv2, CLIP's vision tower, sentence encoders), scored by embeddings.

The embedding of an image is the model's pooled output, or its first token where it has none; that of a text is the mean
over its tokens, as in most sentence encoders. The score is the cosine to the dense model's embeddings, and 1 - cosine
takes the place of the KL divergence wherever plans are compared. Texts are scored one by one, each cut at the model's
context; calibration windows are packed, between [CLS] and [SEP] where the tokenizer has these tokens. Those of a
decoder without a head are drawn as for text generation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.architectures.config import is_decoder
from billhook.engine.batch import Batch
from billhook.errors import BillhookError
from billhook.evaluation.divergence import COSINE, Divergence
from billhook.images.labels import UNKNOWN
from billhook.tasks.base import Drawing, Home, Inputs, Progress, Samples
from billhook.tasks.image_inputs import Images, image_samples
from billhook.tasks.token_windows import drawn_windows, framed, tokenizer_of, window_length
from billhook.text.chat import chat_of
from billhook.text.corpus import documents


@dataclass(frozen=True)
class Texts:
    """Documents of a SOURCE, each an input of its own."""

    source: str
    texts: list[str]
    tokenizer: Tokenizer
    length: int

    def batches(self, limit: int | None) -> Iterator[Batch]:
        """One text a batch, so that nothing is padded."""
        for text in self.texts[:limit]:
            ids = self.tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt")["input_ids"]
            yield {"input_ids": ids}


@dataclass(frozen=True)
class FeatureExtraction:
    """A batch is {"pixel_values": ...} or {"input_ids": ...}; there are no labels."""

    protocol: ClassVar[str] = "embedding of each input: pooled for images, mean over tokens for texts"
    unit: ClassVar[str] = "input"
    divergence: ClassVar[Divergence] = COSINE
    stacks: ClassVar[str] = "all"
    name: str = "feature-extraction"
    auto_class: str = "AutoModel"

    def samples(
        self, source: Any, model: PreTrainedModel, home: Home, drawing: Drawing, progress: Progress = lambda step: None
    ) -> Samples:
        """Images of a SOURCE, or token windows of a text, for the model's kind of input."""
        if model.main_input_name == "pixel_values":
            return image_samples(source, model, home, drawing, None)
        tokenizer = tokenizer_of(model, home)
        if is_decoder(model):
            return Samples.of(self.batch, drawn_windows(source, tokenizer, model, drawing))
        if drawing.bos == "yes":
            raise BillhookError("The windows of an encoder begin with its [CLS] token: leave out --bos.")
        tokens = drawn_windows(source, tokenizer, model, replace(drawing, bos="no"), reserved=2)
        if tokens.sampling == "given":
            return Samples.of(self.batch, tokens)
        return Samples.of(lambda ids: self.batch(framed(ids, tokenizer)), tokens)

    def inputs(self, source: Any, model: PreTrainedModel, home: Home) -> Inputs:
        """The images or the documents of a SOURCE."""
        if model.main_input_name == "pixel_values":
            return Images.of(source, home, model, None, "evaluation")
        tokenizer = tokenizer_of(model, home)
        if tokenizer is None:
            raise BillhookError(f"The model has no tokenizer to read {source} with.")
        read = documents(str(source), "evaluation", False, chat_of(tokenizer))
        texts = [text for text in read if text.strip()]
        return Texts(str(source), texts, tokenizer, window_length(model, None))

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for pixel values, or token ids int64 [texts, length]."""
        return {"pixel_values": inputs} if inputs.ndim == 4 else {"input_ids": inputs}

    def scored(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings [inputs, 1, width] of pooled outputs [inputs, width] or hidden states [inputs, length, width]."""
        if outputs.ndim == 3:
            outputs = outputs[:, 0] if "pixel_values" in batch else outputs.mean(1)
        found = outputs.flatten(1)[:, None]
        return found, torch.full(found.shape[:2], UNKNOWN, device=found.device)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Raises BillhookError: there is nothing to predict."""
        raise BillhookError("A model without a head has no loss: use a criterion without gradients, such as admm.")


TASK = FeatureExtraction()
