"""What a change of a model's weights has lost, measured by its predictions on text that was used for nothing else.

    reference = Reference.of(model, batch, scoring, source)  # while the model is dense
    loss = reference.compare(model)                          # at any time later

Both pass a text through the model block by block, so that a streamed model is read once, and give the same numbers for
a streamed model and one in memory; images go through the model as a whole. The KL divergence of the predictions, in
nats a token (or an image), gives the verdict: below 0.02 `near lossless`, below 0.1 `good`, below 0.3 `usable`, below 1
`degraded`, and `broken` above. Embeddings are compared by the cosine: distances of 0.005, 0.02, 0.05 and 0.2.

Cost: a forward pass each. In memory: the dense model's 256 most likely tokens of every position (`TopKTeacher`).
Limits: a dozen windows tell verdicts apart and not methods that are nearly alike; the standard error says so.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.distributed.collectives import gather, shard
from billhook.engine.batch import Batch, main_input, split_rows
from billhook.engine.replay import run_block
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import walk
from billhook.evaluation.divergence import COSINE
from billhook.evaluation.kl import WindowKl, percentiles, standard_error
from billhook.evaluation.predicting import predicted, row_nll, rows_at_once
from billhook.evaluation.scoring import Scoring, each, scored_rows

VERDICTS = {"near lossless": 0.02, "good": 0.1, "usable": 0.3, "degraded": 1.0}  # below these, in nats a token
DISTANCES = dict(zip(VERDICTS, (0.005, 0.02, 0.05, 0.2), strict=True))  # below these, 1 - cosine
BROKEN = "broken"
SCALE = ", ".join(f"below {limit:g} {word}" for word, limit in VERDICTS.items()) + f", above {BROKEN}"
DISTANCE_SCALE = ", ".join(f"below {limit:g} {word}" for word, limit in DISTANCES.items()) + f", above {BROKEN}"


@dataclass(frozen=True)
class Loss:
    """What was lost, in six significant digits.

    * `verdict`: by `kl`, or by `cosine`.
    * `kl` (number or null): KL divergence from the dense model, mean over tokens in nats; null if it is not finite, or
      if the model has embeddings instead of predictions.
    * `kl_error` (number or null): its standard error over windows.
    * `kl_99` (number or null, optional): the 99th percentile of the divergence over tokens, linearly interpolated; not
      in records of earlier versions.
    * `kl_999` (number or null, optional): the 99.9th; of fewer than some thousand tokens nearly the largest.
    * `top1_agreement`: fraction of tokens for which both models have the same top-1 prediction.
    * `token_ppl` (number or null): token perplexity; null if it is too large to be a number.
    * `dense_token_ppl` (number or null): that of the dense model.
    * `windows`: windows of text, or images.
    * `length`: tokens in a window (of several lengths the longest), or pixels in a row of an image.
    * `source`: the text or the images.
    * `held_out`: false where the text was too short, and the windows are some of those that were used.
    * `unit` (string, optional): what is predicted where that is not a token: an image, an answer, or an input of
      an encoder.
    * `accuracy` (number, optional): top-1 accuracy on the images, or the exact match of the answers.
    * `dense_accuracy` (number, optional): that of the dense model.
    * `cosine` (number, optional): cosine of the embeddings and the dense model's, mean over inputs.
    * `cosine_error` (number, optional): its standard error.
    """

    verdict: str
    kl: float | None
    kl_error: float | None
    top1_agreement: float | None
    token_ppl: float | None
    dense_token_ppl: float | None
    windows: int
    length: int
    source: str
    held_out: bool
    kl_99: float | None = None
    kl_999: float | None = None
    unit: str = "token"
    accuracy: float | None = None
    dense_accuracy: float | None = None
    cosine: float | None = None
    cosine_error: float | None = None

    @property
    def divergence(self) -> float | None:
        """`kl`, or for embeddings the mean of 1 - cosine, by which models are compared; None if it is not finite."""
        return self.kl if self.cosine is None else 1 - self.cosine

    def to_dict(self) -> dict[str, Any]:
        """The fields of its unit, for json."""
        fields = asdict(self)
        return {k: v for k, v in fields.items() if k not in _OF_ROWS or (self.unit != "token" and v is not None)}

    def __str__(self) -> str:
        if self.unit != "token":
            return self._of_rows()
        kl = "not finite" if self.kl is None else f"{self.kl:.4f}"
        error = "" if self.kl_error is None else f" +- {self.kl_error:.2g}"
        tail = (
            "" if self.kl_999 is None else f" (99 % of tokens below {self.kl_99:.3g}, 99.9 % below {self.kl_999:.3g})"
        )
        ppl, dense = (f"{x:.2f}" if x is not None else "infinite" for x in (self.token_ppl, self.dense_token_ppl))
        where = f"{self.windows} {'held-out' if self.held_out else 'calibration'} windows of {self.length} tokens"
        return (
            f"{self.verdict}: KL divergence from the dense model {kl}{error} nats a token{tail}, top-1 agreement "
            f"{100 * (self.top1_agreement or 0):.1f} %, perplexity {ppl} (dense {dense}), on {where} of {self.source}"
        )

    def _of_rows(self) -> str:
        where = f"{self.windows} {'held-out' if self.held_out else 'calibration'} {self.unit}s of {self.source}"
        if self.cosine is not None:
            error = "" if self.cosine_error is None else f" +- {self.cosine_error:.2g}"
            return f"{self.verdict}: cosine to the dense embeddings {self.cosine:.4f}{error}, on {where}"
        kl = "not finite" if self.kl is None else f"{self.kl:.4f}"
        error = "" if self.kl_error is None else f" +- {self.kl_error:.2g}"
        agreed = f"top-1 agreement {100 * (self.top1_agreement or 0):.1f} %"
        known = ""
        if self.accuracy is not None and self.dense_accuracy is not None:
            word = "exact match" if self.unit == "answer" else "accuracy"
            known = f", {word} {100 * self.accuracy:.1f} % (dense {100 * self.dense_accuracy:.1f} %)"
        start = f"{self.verdict}: KL divergence from the dense model {kl}{error} nats {each(self.unit)}"
        return f"{start}, {agreed}{known}, on {where}"


def loss_json(loss: Loss | None) -> dict[str, Any] | None:
    """A loss for json; null where it was not measured."""
    return None if loss is None else loss.to_dict()


_OF_ROWS = ("unit", "accuracy", "dense_accuracy", "cosine", "cosine_error")


def verdict(divergence: float | None, limits: Mapping[str, float] = VERDICTS) -> str:
    """The word for a KL divergence in nats a token, or for a distance by its `limits`."""
    below = (word for word, limit in limits.items() if divergence is not None and divergence < limit)
    return next(below, BROKEN)


@dataclass(frozen=True)
class Reference:
    """The dense model's predictions: of each row of this process's batches, its `teachers`, the `nll` of its text in
    nats a token, and for how many rows its predictions are all `right`."""

    batches: Sequence[Batch]
    scoring: Scoring
    source: str
    held_out: bool
    teachers: list[Any]
    nll: list[float]
    right: list[int]
    length: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        batch: Batch,
        scoring: Scoring,
        source: str,
        *,
        held_out: bool = True,
        resources: Resources = IN_MEMORY,
    ) -> "Reference":
        """Record the predictions of a model that is still dense for the rows of `batch`, of the text named `source`."""
        inputs = main_input(model, batch)
        length = inputs.shape[1 if inputs.ndim == 2 else -1]
        batches = split_rows(batch, rows_at_once(model, batch))
        teachers, nll, right = [], [], []
        for outputs, labels in _predictions(model, batches, scoring, resources):
            teachers.append(scoring.divergence.teacher(outputs))
            nll.append(row_nll(outputs, labels))
            right.append(int(_right(outputs, labels)))
        return cls(batches, scoring, source, held_out, teachers, nll, right, length)

    def compare(self, model: PreTrainedModel, resources: Resources = IN_MEMORY) -> Loss:
        """What the model as it is now has lost."""
        rows = list[tuple[WindowKl, float, float, int, int, int]]()
        found = _predictions(model, self.batches, self.scoring, resources)
        known = zip(found, self.teachers, self.nll, self.right, strict=True)
        for (outputs, labels), teacher, dense, dense_right in known:
            divergence, right = self.scoring.divergence.compare(outputs, teacher), int(_right(outputs, labels))
            rows.append((divergence, row_nll(outputs, labels), dense, len(labels), right, dense_right))
        rows = [row for part in gather(rows) for row in part]
        windows, nll, dense_nll = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
        tokens, right, dense_right = (sum(counts) for counts in zip(*(row[3:] for row in rows), strict=True))
        kl, agreed = [x.mean for x in windows], sum(x.agreed for x in windows)
        mean = _finite(statistics.fmean(kl))
        spread = None if mean is None else standard_error(kl)
        error = None if spread is None else _finite(spread)
        loss = Loss(
            verdict(mean), kl=mean, kl_error=error, top1_agreement=round(agreed / tokens, 6),
            token_ppl=None, dense_token_ppl=None, windows=len(rows), length=self.length, source=self.source,
            held_out=self.held_out, unit=self.scoring.unit,
        )  # fmt: skip
        if self.scoring.unit == "token":
            kl_99, kl_999 = percentiles(windows)
            return replace(loss, token_ppl=_ppl(nll), dense_token_ppl=_ppl(dense_nll), kl_99=kl_99, kl_999=kl_999)
        if self.scoring.divergence is COSINE:
            cosine, word = None if mean is None else round(1 - mean, 9), verdict(mean, DISTANCES)
            loss = replace(loss, verdict=word, kl=None, kl_error=None, top1_agreement=None)
            return replace(loss, cosine=cosine, cosine_error=error)
        if any(map(math.isnan, dense_nll)):  # there are no labels
            return loss
        return replace(loss, accuracy=round(right / len(rows), 6), dense_accuracy=round(dense_right / len(rows), 6))


@torch.no_grad()
def _predictions(
    model: PreTrainedModel, batches: Sequence[Batch], scoring: Scoring, resources: Resources
) -> Iterator[tuple[Tensor, Tensor]]:
    """The scored outputs [n, classes] and labels [n] of every row of this process's batches."""
    if scoring.unit != "token":
        with evaluating(model):
            for batch in shard(batches):
                yield from predicted(model, batch, scoring)
        return
    for block in walk(model, batches, resources=resources):
        if block.last:
            for states, call, batch in zip(block.inputs, block.calls, shard(batches), strict=True):
                logits = block.following.predict(run_block(block.module, states, call))
                yield from (pair for pair in scored_rows(*scoring.scored(logits, batch)) if len(pair[1]))


def _right(outputs: Tensor, labels: Tensor) -> bool:
    """Whether all predictions of a row are those of the labels."""
    return bool((outputs.argmax(-1) == labels).all())


def _finite(value: float) -> float | None:
    """In six significant digits, so that runs whose sums differ in the last bits have the same record."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _ppl(nll: Sequence[float]) -> float | None:
    mean = statistics.fmean(nll)
    return _finite(math.exp(mean)) if mean < 700 else None
