"""Gradients of the dense model, one block in memory at a time, accumulated over calibration sequences (GBLM-Pruner).

Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", arXiv:2311.04902: the
statistic of a weight is a norm, over sequences, of the gradient of the model's own language-modelling loss (labels =
inputs, mean over the tokens of a sequence, evaluation mode), without an auxiliary loss of routers.

The published code holds the model, all its gradients and two accumulators. Here (1) the sequences go forward once,
without a graph, and the inputs of each block are stored; (2) from the last block to the first, each block runs again on
its stored inputs, with a graph, and the gradient of its outputs gives those of its weights and of its inputs. The last
block runs inside the model's own forward, so the final norm, head and loss are the model's own. In float32 the result
equals that of a backward pass through the whole model bit for bit. The cost is one more forward pass. Memory: the
model, the gradients and sums of one block, the gradients of one block's inputs, and the stored inputs, which are
spilled to disk beyond `spill_gib`.

float16 models: gradients below 6e-8 underflow. Each backward pass therefore starts from gradients times a power of two
that brings the largest near one (a smaller power where that overflows), which is divided out before the float32 sums.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.layers import Layer, find_layers, observable_experts
from billhook.architectures.stacks import blocks_of, decoder_stack, has_one_stack
from billhook.distributed.collectives import check_share, shard
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch, as_batches, split_rows
from billhook.engine.capture import Captured, Forward, capture, split_call, stubbed
from billhook.engine.gradient_file import Gradients, open_gradients, write_gradients
from billhook.engine.regional_gradients import regional_gradients
from billhook.engine.replay import run_block
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.restore import differentiable
from billhook.engine.walk import Progress, check_finite_states
from billhook.errors import BillhookError, JobError
from billhook.methods.statistics import GRADIENTS, REGIONAL, GradientNorm
from billhook.registry import hint

_LOWER = (0, 6, 12, 18)  # powers of two by which the start is lowered while float16 gradients overflow
_HEADROOM = 8  # a float16 backward pass starts from 2 ** _HEADROOM times the tokens of the sequence

Loss = Callable[[PreTrainedModel, Batch], Tensor]  # the model's own loss on a batch, a scalar


def compute_gradients(
    model: PreTrainedModel,
    batches: Tensor | Batch | Sequence[Tensor | Batch],
    statistic: str,
    path: Path,
    *,
    loss: Loss,
    layers: Sequence[Layer] | None = None,
    facts: Mapping[str, Any] | None = None,
    resources: Resources = IN_MEMORY,
    progress: Progress = lambda layer: None,
) -> Gradients:
    """Accumulate a statistic of the gradients of `layers` (all prunable ones by default) and write it to `path`.

    Every row of `batches` (token ids int64 [windows, length], or mappings) is a sequence, for any batch size. `loss` is
    the model's loss on a batch. `facts` (of model and calibration) are written to the file. Stored block inputs beyond
    the spill limit go to temporary files next to `path`. Raises BillhookError for an unknown statistic or no samples;
    JobError, naming the layer and with nothing written, for gradients that are not finite.
    """
    norm, sequences = _norm(statistic), _sequences(model, batches)
    layers = find_layers(model) if layers is None else layers
    about = {"statistic": statistic, "samples": len(sequences), **(facts or {})}
    check_share(len(sequences))
    resources = replace(resources, folder=path.parent)

    def values() -> Iterator[tuple[str, Tensor]]:
        if statistic == REGIONAL:
            found = regional_gradients(model, sequences, layers, resources)
        else:
            kind = Backward if has_one_stack(model) else _WholeBackward
            found = kind(model, shard(sequences), loss, resources).run(norm, layers)
        with observable_experts(model), evaluating(model):
            for name, value in found:
                yield name, value
                progress(name)

    shapes = {layer.name: layer.shape for layer in layers}
    write_gradients(path, shapes, norm(torch.zeros(1)).value().dtype, about, values)
    return open_gradients(path)


def _norm(statistic: str) -> Callable[[Tensor], GradientNorm]:
    if statistic not in GRADIENTS:
        known = f"{hint(statistic, GRADIENTS)} There are: {', '.join(GRADIENTS)}."
        raise BillhookError(f"Unknown statistic {statistic!r}.{known}")
    return GRADIENTS[statistic]


def _sequences(model: PreTrainedModel, batches: Tensor | Batch | Sequence[Tensor | Batch]) -> list[Batch]:
    sequences = [row for batch in as_batches(model, batches) for row in split_rows(batch, 1)]
    if not sequences:
        raise BillhookError("Gradients need calibration text: give it with --calibration SOURCE.")
    return sequences


class _WholeBackward:
    """One forward and one backward pass of the whole model a sequence, for models with several stacks; all gradients
    and sums are in memory."""

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Batch], loss: Loss, resources: Resources) -> None:
        self.model, self.sequences, self.loss, self.resources = model, sequences, loss, resources

    def run(self, norm: Callable[[Tensor], GradientNorm], layers: Sequence[Layer]) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer's name and statistic [out, in]."""
        with ExitStack() as stack:
            for index in range(len(blocks_of(self.model))):
                stack.enter_context(self.resources.block(index))
            weights = list({id(layer.stored): layer.stored for layer in layers}.values())
            sums = {id(weight): norm(weight) for weight in weights}
            stack.enter_context(differentiable(weights, self.model.parameters()))
            for sequence in self.sequences:
                with torch.enable_grad():
                    found = torch.autograd.grad(self.loss(self.model, sequence), weights, allow_unused=True)
                for weight, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        sums[id(weight)].add(gradient.float())
            for total in sums.values():
                total.merge()
            for layer in layers:
                yield layer.name, _checked(layer, sums[id(layer.stored)].value())


class Backward:
    """One forward and one backward pass, block by block; `gradients` are those of a block's outputs, by sequence.

    `inputs` are those of the blocks, one tensor [1, length, width] a sequence.
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Batch], loss: Loss, resources: Resources) -> None:
        self.model, self.sequences, self.loss, self.resources = model, sequences, loss, resources
        self.inputs: dict[int, ActivationStore] = {}
        self.blocks = blocks_of(model)
        self.modules = list(self.blocks.values())
        self.captured = Captured([], lambda states: states)
        self.gradients: list[_Scaled | None] = [None] * len(sequences)

    def run(self, norm: Callable[[Tensor], GradientNorm], layers: Sequence[Layer]) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer's name and statistic [out, in], from the last block to the first."""
        first = min(layer.block for layer in layers)
        for index in self.indices(first):
            chosen = [layer for layer in layers if layer.block == index]
            weights = list({id(layer.stored): layer.stored for layer in chosen}.values())
            sums = {id(weight): norm(weight) for weight in weights}
            with differentiable(weights):
                for found, power in self.block(index, weights, last=index == first):
                    for weight, gradient in zip(weights, found, strict=True):
                        sums[id(weight)].add(_unscaled(weight, gradient, power))
            for total in sums.values():
                total.merge()
            for layer in chosen:
                yield layer.name, _checked(layer, sums[id(layer.stored)].value())

    def indices(self, first: int) -> Iterator[int]:
        """The indices of the blocks from the last one to `first`, each while its weights are in memory."""
        self._forward(first)
        for index in reversed(range(first, len(self.blocks))):
            with self.resources.block(index, ahead=index - 1):
                yield index

    @torch.no_grad()
    def _forward(self, first: int) -> None:
        """Store the inputs of every block from `first` on."""
        hidden: list[Tensor] = []
        decoder_stack(self.model)
        self.captured = capture(self.model, self.blocks, self.sequences, hidden)
        for index, (name, block) in enumerate(self.blocks.items()):
            if index >= first:
                room = self.resources.spill_gib - sum(states.nbytes for states in self.inputs.values()) / 2**30
                self.inputs[index] = ActivationStore(room, self.resources.folder)
                for states in hidden:
                    self.inputs[index].append(states.cpu())
            if index + 1 < len(self.blocks):
                with self.resources.block(index, ahead=index + 1):
                    calls = self.captured.of(index)
                    hidden = [run_block(block, h, call) for h, call in zip(hidden, calls, strict=True)]
                check_finite_states(hidden, name)

    def block(
        self, index: int, weights: Sequence[Tensor], *, last: bool = False
    ) -> Iterator[tuple[list[Tensor | None], int]]:
        """The gradients of `weights` times 2 ** power, and the power, of every sequence.

        Unless it is the `last` block that is visited, the gradients of its inputs are stored.
        """
        for number, states in enumerate(self.inputs.pop(index).take()):
            states = states.to(self.model.device).requires_grad_()
            output, start = self._output(index, number, states)
            found, power = _gradients(output, [*weights] if last else [*weights, states], start)
            self.gradients[number] = None if last else _Scaled.of(found.pop(), power)
            yield found, power

    def _output(self, index: int, number: int, states: Tensor) -> tuple[Tensor, "_Scaled"]:
        """The outputs of a block for one sequence (of the last block its loss), and where their gradient starts."""
        with torch.enable_grad():
            if index + 1 == len(self.blocks):
                output = self._last_block_loss(self.sequences[number], states)
                power = math.ceil(math.log2(states.shape[1])) + _HEADROOM if states.dtype == torch.float16 else 0
                return output, _Scaled(torch.full_like(output, 2.0**power), power)
            output = run_block(self.modules[index], states, self.captured.of(index)[number])
        start = self.gradients[number]
        assert start is not None
        return output, start

    def _last_block_loss(self, sequence: Batch, states: Tensor) -> Tensor:
        """The model's own loss on a sequence, with `states` as the inputs of its last block, and no other block run."""

        def stub(index: int, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                hidden, call = split_call(forward, args, kwargs)
                last = index + 1 == len(self.blocks)
                return forward(states, *call.args, **call.kwargs) if last else self.captured.returned(hidden)

            return run

        with stubbed(self.blocks, stub):
            return self.loss(self.model, sequence)


def _unscaled(weight: Tensor, gradient: Tensor | None, power: int) -> Tensor:
    """The gradient of a weight (None: it has none), without its factor 2 ** power."""
    gradient = torch.zeros_like(weight) if gradient is None else gradient
    exact = power == 0 and gradient.dtype == torch.float32
    return gradient if exact else torch.ldexp(gradient.float(), torch.tensor(-power))


@dataclass(frozen=True)
class _Scaled:
    """A gradient times 2 ** power."""

    value: Tensor
    power: int

    @classmethod
    def of(cls, value: Tensor, power: int) -> "_Scaled":
        """The gradient value * 2 ** -power; in float16 scaled so that the largest is near one."""
        largest = float(value.abs().max()) if value.dtype == torch.float16 else 0.0
        if largest == 0 or not math.isfinite(largest):
            return cls(value, power)
        up = -math.frexp(largest)[1]
        return cls(torch.ldexp(value.float(), torch.tensor(up)).half(), power + up)


def _gradients(output: Tensor, wanted: Sequence[Tensor], start: _Scaled) -> tuple[list[Any], int]:
    """The gradients of `wanted` times 2 ** power, and that power; in float16 lowered where they would overflow."""
    half = wanted[-1].dtype == torch.float16
    found: list[Any] = []
    power = start.power
    for lower in _LOWER if half else (0,):
        seed, power = (start.value * 2.0**-lower if lower else start.value), start.power - lower
        found = list(torch.autograd.grad(output, wanted, seed, retain_graph=half, allow_unused=True))
        if not half or all(gradient is None or bool(gradient.isfinite().all()) for gradient in found):
            break
    return found, power


def _checked(layer: Layer, value: Tensor) -> Tensor:
    """A layer's part of the statistic of its parameter, [out, in]; raises JobError when it is not finite."""
    value = layer.view(value)
    if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
        raise JobError(f"The gradients of {layer.name} hold NaN or infinity: use --dtype float32, or mode=paper.")
    return value
