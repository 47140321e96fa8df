"""What a search measures: cheap trials that reuse the dense model's statistics, and full runs that prune block by
block.

A trial masks every layer at once with the criterion's own scores, computed from the inputs of the dense model, through
thresholds sorted once (`billhook.trials.ladder`), and scores the result on held-out windows. Gradients are those of
the dense model in a full run too, so they are computed once for all. Criteria that need more (SparseGPT's
reconstruction) are stood in for by Wanda's mask: cheap trials then rank plans, and only the full runs use the
criterion.

The loss is the Kullback-Leibler divergence from the dense model's next-token distribution, in nats a token, or the
negative log-likelihood (`billhook.trials.predictions`). `Bench.attribute` says which layers the divergence comes
from.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.gradient_file import Gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.loop import Group, LayerResult, prune_
from billhook.engine.walk import evaluating, walk
from billhook.errors import JobError
from billhook.methods.masks import Select
from billhook.methods.sparse import CRITERIA
from billhook.methods.statistics import GRADIENTS, STATISTICS, LayerStats
from billhook.plan.plan import Plan
from billhook.steps.request import TOKENS_A_BATCH
from billhook.trials.attribution import attribute
from billhook.trials.ladder import Ladder
from billhook.trials.predictions import TopKTeacher, compare, kl_grad, remember


@dataclass(frozen=True)
class Losses:
    """Per window, in nats a token: `kl` from the dense model, and `nll` of the text."""

    kl: list[float]
    nll: list[float]


@dataclass(frozen=True)
class Setting:
    """How layers are pruned in every trial and full run of one search."""

    criterion: str
    options: dict[str, Any]
    group: Group | None = None

    @property
    def proxy(self) -> tuple[str, dict[str, Any]]:
        """The criterion, with its options, that a cheap trial uses."""
        cheap = set(CRITERIA.needs(self.criterion, self.options)) <= {"input_norm", *GRADIENTS}
        return (self.criterion, self.options) if cheap else ("wanda", {})

    @property
    def gradient(self) -> str | None:
        """The statistic of gradients that the criterion reads, if it reads one."""
        return next((name for name in CRITERIA.needs(self.criterion, self.options) if name in GRADIENTS), None)


class Bench:
    """A model whose layers are pruned and restored again and again; holds a second copy of their weights. Leaving it
    restores them."""

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
        """`batches` are calibration ids [batch, length], `heldout` ids [windows, length], both int64.

        `gradients` are the dense model's on `batches`; without them they are computed when first needed.
        """
        self.model, self.layers, self.batches, self.heldout, self.setting = (
            model,
            list(layers),
            list(batches),
            heldout,
            setting,
        )
        self.shapes = {layer.name: layer.shape for layer in layers}
        self._dense = {layer.name: layer.weight.clone() for layer in layers}
        self._stats: dict[str, LayerStats] = {}
        self._ladders: dict[str, Ladder] = {}
        self._reference: list[TopKTeacher] = []  # of each held-out window
        self._gradients = gradients
        self._files = ExitStack()
        self._pruned: tuple[Plan, list[LayerResult]] | None = None  # what `prune` made of the model, as it still is

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore_()
        self._files.close()

    @torch.no_grad()
    def _open(self) -> None:
        """Note the dense model's predictions and, if the criterion reads them, its gradients: once for all trials and
        full runs."""
        if self._reference:
            return
        self.restore_()
        name = self.setting.gradient
        if name is not None and self._gradients is None:
            folder = Path(self._files.enter_context(tempfile.TemporaryDirectory(prefix="billhook.")))
            self._gradients = compute_gradients(
                self.model, self.batches, name, folder / "gradients.safetensors", layers=self.layers
            )
        self._reference = [remember(logits) for logits, _ in self._predictions(0, len(self.heldout))]

    @torch.no_grad()
    def _prepare(self) -> None:
        """Collect the dense model's statistics and sort its scores: once for all trials."""
        self._open()
        if self._ladders:
            return
        self.restore_()
        observed = tuple(name for name in CRITERIA.needs(*self.setting.proxy) if name in STATISTICS)
        chosen = {layer.name for layer in self.layers}
        for block in walk(self.model, self.batches if observed else (), observed, read_only=True):
            for layer in block.layers:
                if layer.name in chosen:
                    self._stats[layer.name] = block.stats.get(layer.name, LayerStats(0, 0))
                    self._ladders[layer.name] = Ladder.of(self._score(layer), self._group(layer))

    @torch.no_grad()
    def trial(self, plan: Plan) -> None:
        """Mask every layer in place as `plan` says, with the dense model's statistics."""
        self._prepare()
        self._pruned = None
        zeros = plan.zeros(self.shapes)
        for layer in self.layers:
            spec = plan.weights[layer.name]
            select: Callable[..., Tensor] = self._ladders[layer.name].at(spec.sparsity)
            if spec.keep_of is not None:
                select = Select(layer.shape, spec.sparsity, zeros[layer.name], spec.keep_of, self._group(layer))
            layer.weight.copy_(self._apply(layer, select))

    def prune(self, plan: Plan) -> list[LayerResult]:
        """Prune in place as `billhook prune` does: block by block, each seeing what the pruned ones before it
        produce."""
        if self._pruned is not None and self._pruned[0] == plan:
            return self._pruned[1]
        self._open()
        self.restore_()
        setting = self.setting
        results = prune_(
            self.model,
            plan,
            criterion=setting.criterion,
            batches=self.batches,
            layers=self.layers,
            group=setting.group,
            gradients=self._gradients,
            **setting.options,
        )
        self._pruned = (plan, results)
        return results

    def restore_(self) -> None:
        """Put the dense weights back."""
        self._pruned = None
        for layer in self.layers:
            layer.weight.copy_(self._dense[layer.name])

    @torch.no_grad()
    def losses(self, first: int, last: int) -> Losses:
        """Score the model as it now is on held-out windows `first` to `last` (exclusive); raises JobError for a loss
        that is not finite."""
        kl, nll = [], []
        for window, (logits, ids) in enumerate(self._predictions(first, last), start=first):
            divergence, likelihood = compare(logits, ids, self._reference[window])
            _check_finite(window, divergence, likelihood)
            kl.append(divergence)
            nll.append(likelihood)
        return Losses(kl, nll)

    def attribute(self) -> tuple[list[float], dict[str, float]]:
        """The divergence on each held-out window of the model as it now is, and each layer's share of their mean."""
        found: list[float] = []

        def back(window: int, logits: Tensor) -> Tensor:
            divergence, gradient = kl_grad(logits, self._reference[window])
            _check_finite(window, divergence)
            found.append(divergence)
            return gradient

        return found, attribute(self.model, self.layers, self._dense, self.heldout, back)

    def _predictions(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each window the logits [length - 1, vocabulary] and the tokens int64 [length - 1] they are to predict."""
        size = max(1, TOKENS_A_BATCH // self.heldout.shape[1])
        for ids in self.heldout[first:last].split(size):
            ids = ids.to(self.model.device)
            with evaluating(self.model):
                predicted = self.model(input_ids=ids, use_cache=False).logits
            for row, logits in zip(ids, predicted, strict=True):
                yield logits[:-1], row[1:]

    def _group(self, layer: Layer) -> Group:
        """The comparison group of this layer in a trial: magnitude's own where a layer saw no token."""
        return self.setting.group or CRITERIA.group(self._criterion(layer)[0])

    def _criterion(self, layer: Layer) -> tuple[str, dict[str, Any]]:
        """The proxy, or magnitude for an expert that received no token, as when pruning."""
        name, options = self.setting.proxy
        return ("magnitude", {}) if self._unseen(layer) else (name, options)

    def _unseen(self, layer: Layer) -> bool:
        """Whether the calibration text says nothing about a layer."""
        needs = CRITERIA.needs(*self.setting.proxy)
        if any(name in STATISTICS for name in needs):
            return self._stats[layer.name].tokens == 0
        gradient = self._stats_of(layer).gradient if needs else None
        return gradient is not None and not gradient.any()

    def _stats_of(self, layer: Layer) -> LayerStats:
        """What the proxy may read; gradients come from their file each time, so that they are not all in memory."""
        stats = self._stats[layer.name]
        if self._gradients is None or not set(CRITERIA.needs(*self.setting.proxy)) & set(GRADIENTS):
            return stats
        return replace(stats, gradient=self._gradients[layer.name].to(layer.weight.device))

    def _apply(self, layer: Layer, select: Callable[..., Tensor]) -> Tensor:
        name, options = self._criterion(layer)
        new: Tensor = CRITERIA.get(name)(self._dense[layer.name].float(), self._stats_of(layer), select, **options)
        return new

    def _score(self, layer: Layer) -> Tensor:
        """The criterion's scores [out, in], read as they pass to the selection."""
        seen: list[Tensor] = []

        def select(score: Tensor, start: int = 0) -> Tensor:
            seen.append(score)
            return torch.ones_like(score, dtype=torch.bool)

        self._apply(layer, select)
        return seen[0]


def _check_finite(window: int, *losses: float) -> None:
    if not all(map(math.isfinite, losses)):
        raise JobError(
            f"The pruned model's loss on held-out window {window} is not a finite number. Try --dtype float32."
        )
