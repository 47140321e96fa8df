"""Scores of models that predict one thing for a whole input: image classifiers, answers to questions about images, and
encoders with their embeddings.

Top-1 and top-5 accuracy, or the exact match of answers, with their standard errors, sqrt(p (1 - p) / n); with the dense
model the KL divergence of the class distributions in nats an image (a token of an answer), and how often both models
agree; for embeddings the cosine to the dense ones.
"""

import hashlib
import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.ambient import evaluating, pinned
from billhook.engine.batch import Batch
from billhook.errors import BillhookError, JobError
from billhook.evaluation.batching import Progress
from billhook.evaluation.divergence import COSINE
from billhook.evaluation.kl import WindowKl, standard_error
from billhook.evaluation.predicting import predicted, row_nll
from billhook.evaluation.scoring import Scoring
from billhook.store.tensor_bytes import tensor_bytes

TOP = 5


@dataclass(frozen=True)
class RowsAgainst:
    """A comparison with the dense model on the same inputs.

    * `model`: name of the dense model.
    * `kl` (number, optional): KL divergence from the dense model in nats, mean over images or answers (of an answer the
      mean over its tokens).
    * `kl_error` (number, optional): its standard error.
    * `top1_agreement` (number, optional): fraction of images (or tokens of answers) for which both have the same top-1
      prediction.
    * `top1` (number, optional): the dense model's top-1 accuracy.
    * `top5` (number, optional): its top-5 accuracy.
    * `exact_match` (number, optional): its exact match.
    * `cosine` (number, optional): cosine of the embeddings and the dense model's, mean over inputs.
    * `cosine_error` (number, optional): its standard error.
    """

    model: str
    kl: float | None = None
    kl_error: float | None = None
    top1_agreement: float | None = None
    top1: float | None = None
    top5: float | None = None
    exact_match: float | None = None
    cosine: float | None = None
    cosine_error: float | None = None


@dataclass(frozen=True)
class RowScores:
    """The scores of a model on images or other inputs.

    * `inputs`: how many.
    * `unit`: what they are: image, answer or input.
    * `source`: where they are from, as it was named.
    * `digest`: SHA-256 of the pixel values and token ids.
    * `protocol`: how they are scored.
    * `top1` (number, optional): fraction of the images whose most likely class is their label.
    * `top1_error` (number, optional): its standard error.
    * `top5` (number, optional): fraction whose label is among the five most likely classes, with more than five.
    * `top5_error` (number, optional): its standard error.
    * `exact_match` (number, optional): fraction of the answers of which every token is the most likely one.
    * `exact_match_error` (number, optional): its standard error.
    * `nll` (number, optional): mean negative log-likelihood of the labels in nats (a token, of answers).
    * `skipped` (integer, optional): how many more were left out because they cannot be read.
    * `against` (object, optional): the comparison with the dense model.
    """

    inputs: int
    unit: str
    source: str
    digest: str
    protocol: str
    top1: float | None = None
    top1_error: float | None = None
    top5: float | None = None
    top5_error: float | None = None
    exact_match: float | None = None
    exact_match_error: float | None = None
    nll: float | None = None
    skipped: int | None = None
    against: RowsAgainst | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are known, for json."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        if self.against is not None:
            found["against"] = {key: value for key, value in asdict(self.against).items() if value is not None}
        return found


@pinned
@torch.inference_mode()
def evaluate_rows(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    scoring: Scoring,
    *,
    source: str = "given inputs",
    against: PreTrainedModel | None = None,
    progress: Progress = lambda what: None,
) -> RowScores:
    """Score a model on batches of inputs, and compare it with the dense model `against`.

    Raises BillhookError for models with different numbers of classes, where nothing could be scored, and for no input;
    JobError for outputs that are not finite.
    """
    models = [model] if against is None else [model, against]
    tallies = [_Tally(scoring.unit) for _ in models]
    divergences: list[float] = []
    agreed, predictions, seen = 0, 0, hashlib.sha256()
    with ExitStack() as modes:
        for each in models:
            modes.enter_context(evaluating(each))
        for batch in batches:
            for name in sorted(batch.keys() & {model.main_input_name, "input_ids", "pixel_values"}):
                seen.update(tensor_bytes(batch[name].cpu().contiguous()))
            found = [predicted(each, batch, scoring) for each in models]
            if len(found) > 1:
                for (ours, _), (theirs, _) in zip(*found, strict=True):
                    distance = _compared(scoring, ours, theirs.to(ours.device))
                    divergences.append(distance.mean)
                    agreed, predictions = agreed + distance.agreed, predictions + len(ours)
            for tally, pairs in zip(tallies, found, strict=True):
                tally.add(pairs)
            progress(f"{tallies[0].count} {scoring.unit}s")
    if not tallies[0].count:
        raise BillhookError(f"{source} is empty: there is nothing to score.")
    scores = RowScores(tallies[0].count, scoring.unit, source, digest=seen.hexdigest(), protocol=scoring.protocol)
    if scoring.divergence is not COSINE:
        scores = replace(scores, **tallies[0].summary())
    if against is None:
        return scores
    name = Path(against.name_or_path or "").name or type(against).__name__
    mean, error = statistics.fmean(divergences), standard_error(divergences)
    if scoring.divergence is COSINE:
        return replace(scores, against=RowsAgainst(name, cosine=1 - mean, cosine_error=error))
    kept = {key: value for key, value in tallies[1].summary().items() if key in {f.name for f in fields(RowsAgainst)}}
    compared = RowsAgainst(name, kl=mean, kl_error=error, top1_agreement=agreed / predictions, **kept)
    return replace(scores, against=compared)


class _Tally:
    """What one model predicted so far."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.count = self.first = self.among = self.classes = 0
        self.nll: list[float] = []

    def add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the outputs and labels of the rows of a batch."""
        for outputs, labels in pairs:
            if not bool(torch.isfinite(outputs).all()):
                raise JobError(f"The model's output for input {self.count} is not finite: use --dtype float32.")
            self.count, self.classes = self.count + 1, outputs.shape[-1]
            best = outputs.topk(min(TOP, self.classes), -1).indices
            self.first += int((best[:, 0] == labels).all())
            self.among += int((best == labels[:, None]).any())
            self.nll.append(row_nll(outputs, labels))

    def summary(self) -> dict[str, Any]:
        """The accuracies and the mean loss; nothing where labels are not known."""
        if not self.count or any(map(math.isnan, self.nll)):
            return {}
        rates = {"exact_match" if self.unit == "answer" else "top1": self.first / self.count}
        if self.classes > TOP and self.unit != "answer":
            rates["top5"] = self.among / self.count
        errors = {f"{name}_error": math.sqrt(rate * (1 - rate) / self.count) for name, rate in rates.items()}
        return rates | errors | {"nll": statistics.fmean(self.nll)}


def _compared(scoring: Scoring, ours: Tensor, theirs: Tensor) -> WindowKl:
    if ours.shape != theirs.shape:
        sizes = f"{ours.shape[-1]} and {theirs.shape[-1]} outputs"
        raise BillhookError(f"The models have {sizes}: only models with the same classes can be compared.")
    return scoring.divergence.compare(ours, scoring.divergence.teacher(theirs))
