"""Which predictions are scored: every next token of a language model, or those that a task defines."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from billhook.engine.batch import LABELS, Batch

IGNORED = -100  # the label of a position that is not scored, as in torch and transformers


class Scoring(Protocol):
    """How token ids become a batch, and logits become scored predictions with labels."""

    @property
    def protocol(self) -> str:
        """The name of the protocol in reports."""
        ...

    def batch(self, ids: Tensor) -> Batch:
        """The model's inputs (and labels) for token ids int64 [windows, length]."""
        ...

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [windows, n, classes] and their labels int64 [windows, n], `IGNORED` where not scored."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Every token of a window but the first is predicted from the earlier ones."""

    protocol: ClassVar[str] = "token perplexity over non-overlapping windows"

    def batch(self, ids: Tensor) -> Batch:
        """The model's inputs for token ids int64 [windows, length]."""
        return {"input_ids": ids}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [windows, length - 1, vocabulary] and the tokens that they predict, or the batch's labels of these."""
        return logits[:, :-1], batch.get(LABELS, batch["input_ids"])[:, 1:].to(logits.device)


NEXT_TOKEN = NextToken()


def scored_rows(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The scored logits [m, classes] and labels [m] of each window."""
    pairs = zip(logits, labels, strict=True)
    return [(q, y) if bool((kept := y != IGNORED).all()) else (q[kept], y[kept]) for q, y in pairs]


def count_scored(labels: Tensor) -> int:
    """The number of scored predictions."""
    return int(torch.count_nonzero(labels != IGNORED))
