"""What a change of a model's weights has lost, measured by its predictions on text that was used for nothing else.

    reference = Reference.of(model, batches, scoring)  # while the model is dense
    loss = reference.compare(model)                    # at any time later

Both pass the text through the model block by block, so that a streamed model is read once, and give the same numbers
for a streamed model and one in memory. The KL divergence of the next-token predictions, in nats a token, gives the
verdict: below 0.02 `near lossless`, below 0.1 `good`, below 0.3 `usable`, below 1 `degraded`, and `broken` above.

Cost: a forward pass each. In memory: the dense model's 256 most likely tokens of every position (`TopKTeacher`).
Limits: a dozen windows tell verdicts apart and not methods that are nearly alike; the standard error says so.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.config import vocabulary_size
from billhook.distributed.collectives import gather, shard
from billhook.engine.batch import Batch, main_input, split_rows
from billhook.engine.replay import run_block
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import walk
from billhook.evaluation.batching import batch_size
from billhook.evaluation.kl import TopKTeacher, WindowKl, percentiles, window_kl
from billhook.evaluation.perplexity import window_nll
from billhook.evaluation.scoring import Scoring, scored_rows

VERDICTS = {"near lossless": 0.02, "good": 0.1, "usable": 0.3, "degraded": 1.0}  # below these, in nats a token
BROKEN = "broken"
SCALE = ", ".join(f"below {limit:g} {word}" for word, limit in VERDICTS.items()) + f", above {BROKEN}"


@dataclass(frozen=True)
class Loss:
    """What was lost, in six significant digits.

    * `verdict`: by `kl`.
    * `kl` (number or null): KL divergence from the dense model, mean over tokens in nats; null if it is not finite.
    * `kl_error` (number or null): its standard error over windows.
    * `kl_99` (number or null, optional): the 99th percentile of the divergence over tokens, linearly interpolated; not
      in records of earlier versions.
    * `kl_999` (number or null, optional): the 99.9th; of fewer than some thousand tokens nearly the largest.
    * `top1_agreement`: fraction of tokens for which both models have the same top-1 prediction.
    * `token_ppl` (number or null): token perplexity; null if it is too large to be a number.
    * `dense_token_ppl` (number or null): that of the dense model.
    * `windows`: windows of text.
    * `length`: tokens in a window.
    * `source`: the text.
    * `held_out`: false where the text was too short, and the windows are some of those that were used.
    """

    verdict: str
    kl: float | None
    kl_error: float | None
    top1_agreement: float
    token_ppl: float | None
    dense_token_ppl: float | None
    windows: int
    length: int
    source: str
    held_out: bool
    kl_99: float | None = None
    kl_999: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, for json."""
        return asdict(self)

    def __str__(self) -> str:
        kl = "not finite" if self.kl is None else f"{self.kl:.4f}"
        error = "" if self.kl_error is None else f" +- {self.kl_error:.2g}"
        tail = (
            "" if self.kl_999 is None else f" (99 % of tokens below {self.kl_99:.3g}, 99.9 % below {self.kl_999:.3g})"
        )
        ppl, dense = (f"{x:.2f}" if x is not None else "infinite" for x in (self.token_ppl, self.dense_token_ppl))
        where = f"{self.windows} {'held-out' if self.held_out else 'calibration'} windows of {self.length} tokens"
        return (
            f"{self.verdict}: KL divergence from the dense model {kl}{error} nats a token{tail}, top-1 agreement "
            f"{100 * self.top1_agreement:.1f} %, perplexity {ppl} (dense {dense}), on {where} of {self.source}"
        )


def verdict(kl: float | None) -> str:
    """The word for a KL divergence in nats a token."""
    below = (word for word, limit in VERDICTS.items() if kl is not None and kl < limit)
    return next(below, BROKEN)


@dataclass(frozen=True)
class Reference:
    """The dense model's predictions: of each row of this process's batches, its `teachers` and the `nll` of its text in
    nats a token."""

    batches: Sequence[Batch]
    scoring: Scoring
    source: str
    held_out: bool
    teachers: list[TopKTeacher]
    nll: list[float]
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
        length = main_input(model, batch).shape[1]
        batches = split_rows(batch, batch_size(length, vocabulary_size(model), model.dtype.itemsize))
        teachers, nll = [], []
        for logits, labels in _predictions(model, batches, scoring, resources):
            teachers.append(TopKTeacher.of(logits))
            nll.append(_nll(logits, labels))
        return cls(batches, scoring, source, held_out, teachers, nll, length)

    def compare(self, model: PreTrainedModel, resources: Resources = IN_MEMORY) -> Loss:
        """What the model as it is now has lost."""
        rows = list[tuple[WindowKl, float, float, int]]()
        found = _predictions(model, self.batches, self.scoring, resources)
        for (logits, labels), teacher, dense in zip(found, self.teachers, self.nll, strict=True):
            rows.append((window_kl(logits, teacher), _nll(logits, labels), dense, len(labels)))
        rows = [row for part in gather(rows) for row in part]
        windows, nll, dense_nll = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
        kl, agreed, tokens = [x.mean for x in windows], sum(x.agreed for x in windows), sum(row[3] for row in rows)
        mean = _finite(statistics.fmean(kl))
        error = _finite(statistics.stdev(kl) / math.sqrt(len(kl))) if mean is not None and len(kl) > 1 else None
        scores = (verdict(mean), mean, error, round(agreed / tokens, 6), _ppl(nll), _ppl(dense_nll))
        return Loss(*scores, len(rows), self.length, self.source, self.held_out, *percentiles(windows))


@torch.no_grad()
def _predictions(
    model: PreTrainedModel, batches: Sequence[Batch], scoring: Scoring, resources: Resources
) -> Iterator[tuple[Tensor, Tensor]]:
    """The scored logits [tokens, vocabulary] and labels [tokens] of every row of this process's batches."""
    for block in walk(model, batches, resources=resources):
        if block.following.module is None:  # the last block
            for states, call, batch in zip(block.inputs, block.calls, shard(batches), strict=True):
                logits = block.following.predict(run_block(block.module, states, call))
                yield from (pair for pair in scored_rows(*scoring.scored(logits, batch)) if len(pair[1]))


def _nll(logits: Tensor, labels: Tensor) -> float:
    return float(window_nll(logits[None], labels[None])) / len(labels)


def _finite(value: float) -> float | None:
    """In six significant digits, so that runs whose sums differ in the last bits have the same record."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _ppl(nll: Sequence[float]) -> float | None:
    mean = statistics.fmean(nll)
    return _finite(math.exp(mean)) if mean < 700 else None
