"""Trials: a model is pruned in full by one plan after another, and scored on held-out windows.

The scores are the KL divergence from the dense model's predictions (`billhook.evaluation.kl`, with a `TopKTeacher`) and
the negative log-likelihood of the text, each in nats a token.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import gather
from billhook.engine.gradient_file import Gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.loop import Group, LayerResult, prune_
from billhook.engine.restore import restore_, restored
from billhook.engine.walk import evaluating
from billhook.errors import JobError
from billhook.evaluation.batching import batch_size
from billhook.evaluation.kl import TopKTeacher, kl_grad, window_kl
from billhook.evaluation.perplexity import vocabulary_size, window_nll
from billhook.methods.sparse import CRITERIA
from billhook.methods.statistics import GRADIENTS
from billhook.plan.plan import SparsityPlan
from billhook.trials.attribution import attribute


@dataclass(frozen=True)
class Losses:
    """Of each window, in nats a token: `kl` from the dense model, and `nll` of the text."""

    kl: list[float]
    nll: list[float]


@dataclass(frozen=True)
class Setting:
    """How every trial prunes; `group` None is the criterion's own comparison group."""

    criterion: str
    options: dict[str, Any] = field(default_factory=dict)
    group: Group | None = None

    @property
    def gradient(self) -> str | None:
        """The statistic of gradients that the criterion reads, if it reads one."""
        return next((name for name in CRITERIA.needs(self.criterion, self.options) if name in GRADIENTS), None)


class TrialRunner:
    """A context: entering it records the dense model's predictions of the held-out windows and, for a criterion that
    reads them, its gradients; leaving it restores the dense weights, of which a copy is in memory meanwhile.

    Of several processes, the plan and the scores of the first one count: sums differ in their last bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[Layer],
        batches: Sequence[Tensor],
        heldout: Tensor,
        setting: Setting,
        *,
        gradients: Gradients | None = None,
    ) -> None:
        """`batches` are calibration ids [batch, length], `heldout` ids [windows, length], both int64; `gradients` are
        the dense model's on `batches`, computed when the context is entered unless given."""
        self.model, self.layers, self.batches, self.heldout = model, list(layers), list(batches), heldout
        self.setting, self._gradients = setting, gradients
        self._teachers: list[TopKTeacher] = []  # of each held-out window
        self._stack = ExitStack()

    @torch.no_grad()
    def __enter__(self) -> "TrialRunner":
        statistic = self.setting.gradient
        with ExitStack() as stack:
            if statistic is not None and self._gradients is None:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="billhook."))) / "g.safetensors"
                self._gradients = compute_gradients(self.model, self.batches, statistic, path, layers=self.layers)
            self._teachers = [TopKTeacher.of(logits[:-1]) for logits, _ in self._predictions(0, len(self.heldout))]
            self._dense = stack.enter_context(restored(self.layers))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def restore_(self) -> None:
        """Put the dense weights back."""
        restore_(self.layers, self._dense)

    def prune(self, plan: SparsityPlan) -> list[LayerResult]:
        """Prune the dense model in place as `billhook prune` does."""
        self.restore_()
        setting = self.setting
        return prune_(
            self.model,
            gather(plan)[0],
            criterion=setting.criterion,
            batches=self.batches,
            layers=self.layers,
            group=setting.group,
            gradients=self._gradients,
            **setting.options,
        )

    @torch.no_grad()
    def losses(self, first: int, last: int) -> Losses:
        """Score the model as it now is on held-out windows `first` to `last` (exclusive).

        Raises JobError for a loss that is not finite.
        """
        kl, nll = [], []
        for window, (logits, ids) in enumerate(self._predictions(first, last), start=first):
            kl.append(window_kl(logits[:-1], self._teachers[window])[0])
            nll.append(float(window_nll(logits[None], ids[None])) / (len(ids) - 1))
            if not math.isfinite(kl[-1] + nll[-1]):
                raise JobError(
                    f"The pruned model's loss on held-out window {window} is not finite. Try --dtype float32."
                )
        return gather(Losses(kl, nll))[0]

    def attribute(self) -> dict[str, float]:
        """Each layer's share of the divergence of the model as it now is (`billhook.trials.attribution`)."""

        def gradient(window: int, logits: Tensor) -> Tensor:
            return kl_grad(logits, self._teachers[window])

        return gather(attribute(self.model, self.layers, self._dense, self.heldout, gradient))[0]

    def _predictions(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each window the logits [length, vocabulary] and the ids [length]."""
        size = batch_size(self.heldout.shape[1], vocabulary_size(self.model), self.model.dtype.itemsize)
        for ids in self.heldout[first:last].split(size):
            ids = ids.to(self.model.device)
            with evaluating(self.model):
                logits = self.model(input_ids=ids, use_cache=False).logits
            yield from zip(logits, ids, strict=True)
