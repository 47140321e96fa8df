"""Which predictions are scored: every next token of a language model, or those that a task defines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from billhook.engine.batch import LABELS, Batch
from billhook.evaluation.divergence import COSINE, KL, Divergence

IGNORED = -100  # the label of a position that is not scored, as in torch and transformers


class Scoring(Protocol):
    """How inputs become a batch, and outputs become scored predictions with labels.

    `unit` is what is predicted: a token, an image, an answer (of several tokens) or an input (of an encoder).
    `divergence` compares predictions with those of the dense model.
    """

    @property
    def protocol(self) -> str:
        """The name of the protocol in reports."""
        ...

    @property
    def unit(self) -> str:
        """The singular of what predictions are counted in."""
        ...

    @property
    def divergence(self) -> Divergence:
        """How predictions are compared with the dense model's."""
        ...

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs (and labels) for token ids int64 [windows, length], or for pixel values."""
        ...

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [windows, n, classes] and their labels int64 [windows, n], `IGNORED` where not scored."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Every token of a window but the first `begin` is predicted from the earlier ones."""

    protocol: ClassVar[str] = "token perplexity over non-overlapping windows"
    unit: ClassVar[str] = "token"
    divergence: ClassVar[Divergence] = KL
    begin: int = 1

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for token ids int64 [windows, length]."""
        return {"input_ids": inputs}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [windows, length - begin, vocabulary] and the tokens that they predict, or the batch's labels of
        these."""
        labels = batch.get(LABELS, batch["input_ids"])
        return logits[:, self.begin - 1 : -1], labels[:, self.begin :].to(logits.device)


NEXT_TOKEN = NextToken()


def scored_rows(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The scored logits [m, classes] and labels [m] of each window."""
    pairs = zip(logits, labels, strict=True)
    return [(q, y) if bool((kept := y != IGNORED).all()) else (q[kept], y[kept]) for q, y in pairs]


def each(unit: str) -> str:
    """What a divergence or likelihood is the mean over, by the `unit` of a `Scoring`."""
    return {"token": "a token", "answer": "a token of the answers"}.get(unit, f"an {unit}")


def recorded_divergence(lost: Mapping[str, Any]) -> float | None:
    """`Loss.divergence` of a loss as a record or `--json` holds it; None where it was not measured or is not finite."""
    return 1 - lost["cosine"] if lost.get("cosine") is not None else lost.get("kl")


def measured(unit: str) -> str:
    """The divergence from the dense model with what it is in, by the `unit` of a `Scoring`."""
    return COSINE.name if unit == "input" else f"{KL.name}, nats {each(unit)}"


def count_scored(labels: Tensor) -> int:
    """The number of scored predictions."""
    return int(torch.count_nonzero(labels != IGNORED))
