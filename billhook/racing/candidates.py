"""The weights of every level of every group, and the loss's gradients with respect to their probabilities.

`GradientLevels` is what `billhook.racing.rco` needs. `CandidateWeights` holds weights as they are encoded: quantized
ones as codes of one byte, so that K types take K bytes a weight. Levels of units are in `billhook.racing.unit_levels`.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from billhook.architectures.layers import Layer
from billhook.engine.batch import Batch, rows_of, select_rows
from billhook.engine.method import WeightMethod
from billhook.engine.walk import Progress, walk
from billhook.methods.encoded import Encoded
from billhook.methods.statistics import LayerStats
from billhook.plan.spec import Spec
from billhook.trials.attribution import weight_gradients
from billhook.trials.trials import Runner, TrialRunner


class GradientLevels(ABC):
    """Groups of `layers` that have one of several levels each, for a model whose dense weights `runner` restores.

    `rows` are the calibration windows of which gradients are taken; the dense model's predictions on them are recorded
    when this is made.
    """

    def __init__(self, runner: Runner, layers: Sequence[Layer], rows: Batch) -> None:
        self.runner, self.layers, self.rows = runner, list(layers), rows
        runner.restore_()
        self._teachers = [runner.task.divergence.teacher(outputs) for outputs, _ in runner.predictions(rows)]

    @property
    @abstractmethod
    def counts(self) -> list[int]:
        """How many levels each group has."""

    @abstractmethod
    def put_(self, chosen: Sequence[int]) -> None:
        """Put the weights of these levels, one a group, into the model."""

    @abstractmethod
    def slopes(self, layer: Layer, gradient: Tensor, chosen: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
        """<gradient, W_k> for the levels k of each group that a layer belongs to, with the number of the group."""

    def windows(self, count: int, seed: int) -> Iterator[list[int]]:
        """Without end, `count` of the calibration windows, each window once before any again."""
        chance, left = random.Random(seed), list[int]()
        while True:
            while len(left) < count:
                left += chance.sample(range(rows_of(self.rows)), rows_of(self.rows))
            yield left[:count]
            del left[:count]

    def gradients(self, chosen: Sequence[int], rows: Sequence[int]) -> list[list[float]]:
        """∂L/∂p_k = <∂L/∂W, W_k> of every group and level k, where the levels `chosen` are in the model.

        L is the mean KL divergence a token from the dense model on the windows `rows`.
        """
        self.put_(chosen)
        found = [[0.0] * count for count in self.counts]

        def visit(layer: Layer, gradient: Tensor) -> None:
            for group, values in self.slopes(layer, gradient, chosen):
                found[group] = [x + y for x, y in zip(found[group], values, strict=True)]

        batch = select_rows(self.rows, torch.tensor(rows))
        gradients = self.runner.gradients([self._teachers[row] for row in rows])
        tokens = weight_gradients(self.runner.model, self.layers, batch, self.runner.task, gradients, visit)
        return [[x / tokens for x in sums] for sums in found]


def product(gradient: Tensor, weight: Tensor) -> float:
    """<gradient, weight>."""
    return float((gradient.float() * weight).sum(dtype=torch.float64))


class CandidateWeights(GradientLevels):
    """The encoded weights of each group's levels.

    `groups` are tuples of layer names, `specs` the levels of each group.
    """

    def __init__(
        self,
        runner: TrialRunner,
        groups: Sequence[tuple[str, ...]],
        specs: Sequence[Sequence[Spec]],
        rows: Batch,
        method: WeightMethod,
        *,
        progress: Progress = lambda line: None,
    ) -> None:
        self.groups, self.place = groups, {name: k for k, group in enumerate(groups) for name in group}
        super().__init__(runner, [layer for layer in runner.layers if layer.name in self.place], rows)
        self._encoded = self._encode(specs, method, progress)

    @torch.no_grad()
    def _encode(
        self, specs: Sequence[Sequence[Spec]], method: WeightMethod, progress: Progress
    ) -> Mapping[str, list[Encoded]]:
        """The candidates of each layer, from the dense model's statistics."""
        found: dict[str, list[Encoded]] = {}
        model, batches, gradients = self.runner.model, self.runner.batches, self.runner.dense_gradients
        for block in walk(model, batches, method.observed, layers=self.layers, read_only=True):
            for layer in block.layers:
                stats = block.stats.get(layer.name) or LayerStats(0, 0)
                if gradients is not None:
                    stats = replace(stats, gradient=gradients[layer.name].to(layer.weight.device))
                menu = specs[self.place[layer.name]]
                zeros = [round(spec.sparsity * layer.weight.numel()) for spec in menu]
                found[layer.name] = [
                    method.encode(layer.weight.clone(), stats, s, z) for s, z in zip(menu, zeros, strict=True)
                ]
                progress(layer.name)
        return found

    @property
    def counts(self) -> list[int]:
        """How many levels each group has."""
        return [len(self._encoded[group[0]]) for group in self.groups]

    @torch.no_grad()
    def put_(self, chosen: Sequence[int]) -> None:
        """Put the weights of these levels, one a group, into the model."""
        for layer in self.layers:
            layer.weight.copy_(self._encoded[layer.name][chosen[self.place[layer.name]]].decode(layer.weight.dtype))

    def slopes(self, layer: Layer, gradient: Tensor, chosen: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
        """<gradient, W_k> for the levels k of a layer's group."""
        levels = [candidate.decode(torch.float32) for candidate in self._encoded[layer.name]]
        yield self.place[layer.name], [product(gradient, level) for level in levels]
