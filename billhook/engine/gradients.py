"""Gradients of the dense model with one block in memory at a time, accumulated over the calibration sequences for
GBLM-Pruner.

Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", arXiv:2311.04902: the
statistic of a weight is a norm, over sequences, of the gradient of the model's own language-modelling loss (labels =
inputs, mean over a sequence's tokens, evaluation mode). Each sequence is taken on its own. An auxiliary loss of routers
is left out.

The published code holds the model, all its gradients and two accumulators. Here (1) the sequences go forward once,
without a graph, and each block's inputs are stored; (2) from the last block to the first, each block runs again from
its stored inputs, with a graph, and the gradient of its outputs gives those of its weights and of its inputs. The last
block runs inside the model's own forward, so final norm, head and loss are the model's, not a copy. In float32 the
result is that of a backward pass through the whole model, bit for bit. It costs one more forward pass. Memory holds the
model, the gradients and sums of one block, the gradients of one block's inputs, and the stored inputs, which go to disk
beyond `spill_gib`.

float16 models: gradients below 6e-8 do not exist in float16, so each backward pass starts from gradients times a power
of two that brings the largest near one (a smaller power where that overflows); the power is divided out, exactly,
before the float32 sums.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.experts import observable_experts
from billhook.architectures.layers import Layer, find_layers
from billhook.architectures.stacks import blocks_of
from billhook.distributed.collectives import check_share, shard
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch, as_batches, split_rows
from billhook.engine.capture import Segment, capture, evaluating, stubbed
from billhook.engine.gradient_file import Gradients, open_gradients, write_gradients
from billhook.engine.regional_gradients import regional_gradients
from billhook.engine.replay import run_block
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Progress, check_finite_states
from billhook.errors import BillhookError, JobError
from billhook.methods.statistics import GRADIENTS, REGIONAL, AbsoluteSum
from billhook.registry import hint

_LOWER = (0, 6, 12, 18)  # powers of two by which to lower the start while float16 gradients overflow
_HEADROOM = 8  # a float16 backward pass starts from this power of two times the tokens of the sequence

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

    Every row of `batches` (token ids int64 [windows, length], or mappings) is treated separately, whatever the batch
    size. `loss` is the model's loss on a batch (of its task). `facts` (of model and calibration) go into the file.
    Stored block inputs beyond the spill limit go to temporary files beside `path`. `progress` is called with the name
    of each finished layer. Raises BillhookError for an unknown statistic or no samples, JobError, with nothing written,
    for gradients that are not finite (naming the layer).
    """
    if statistic not in GRADIENTS:
        raise BillhookError(
            f"Unknown statistic {statistic!r}.{hint(statistic, GRADIENTS)} There are: {', '.join(GRADIENTS)}."
        )
    sequences = [row for batch in as_batches(model, batches) for row in split_rows(batch, 1)]
    if not sequences:
        raise BillhookError("Gradients need calibration text: give it with --calibration SOURCE.")
    layers = find_layers(model) if layers is None else layers
    about = {"statistic": statistic, "samples": len(sequences), **(facts or {})}
    check_share(len(sequences))
    dtype = GRADIENTS[statistic](torch.zeros(1)).value().dtype
    resources = replace(resources, folder=path.parent)

    def values() -> Iterator[tuple[str, Tensor]]:
        if statistic == REGIONAL:
            found = regional_gradients(model, sequences, layers, resources)
        else:
            found = _Backward(model, shard(sequences), loss, resources).run(GRADIENTS[statistic], layers)
        with observable_experts(model), evaluating(model):
            for name, value in found:
                yield name, value
                progress(name)

    write_gradients(path, {layer.name: layer.shape for layer in layers}, dtype, about, values)
    return open_gradients(path)


class _Backward:
    """One pass forward and one back, block by block; `gradients` are those of the loss with respect to a block's
    outputs.

    The inputs of the blocks, one tensor [1, length, width] a sequence, are stored up to the spill limit in memory.
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Batch], loss: Loss, resources: Resources) -> None:
        self.model, self.sequences, self.loss, self.resources = model, sequences, loss, resources
        self.inputs: dict[int, ActivationStore] = {}
        self.blocks = blocks_of(model)
        self.modules = list(self.blocks.values())
        self.segment = Segment([], lambda states: states)
        self.gradients: list[_Scaled | None] = [None] * len(sequences)

    def run(self, accumulator: type[AbsoluteSum], layers: Sequence[Layer]) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer's name and statistic [out, in], from the last block to the first."""
        first = min(layer.block for layer in layers)
        self._forward(first)
        for index in reversed(range(first, len(self.blocks))):
            chosen = [layer for layer in layers if layer.block == index]
            with self.resources.block(index, ahead=index - 1):
                weights = list({id(weight): weight for weight in map(_parameter, chosen)}.values())
                sums = {id(weight): accumulator(weight) for weight in weights}
                with _differentiable(weights):
                    for number, states in enumerate(self.inputs.pop(index).take()):
                        found = self._block(index, number, states, weights, last=index == first)
                        for weight, gradient in zip(weights, found, strict=True):
                            sums[id(weight)].add(gradient)
                for total in sums.values():
                    total.merge()
                for layer in chosen:
                    yield layer.name, _checked(layer, sums[id(_parameter(layer))].value())

    @torch.no_grad()
    def _forward(self, first: int) -> None:
        """Store the inputs of every block from `first` on."""
        hidden: list[Tensor] = []
        self.segment = capture(self.model, self.blocks, self.sequences, hidden)
        for index, (name, block) in enumerate(self.blocks.items()):
            if index >= first:
                room = self.resources.spill_gib - sum(states.nbytes for states in self.inputs.values()) / 2**30
                self.inputs[index] = ActivationStore(room, self.resources.folder)
                for states in hidden:
                    self.inputs[index].append(states.cpu())
            if index + 1 < len(self.blocks):
                with self.resources.block(index, ahead=index + 1):
                    hidden = [
                        run_block(block, h, call[index]) for h, call in zip(hidden, self.segment.calls, strict=True)
                    ]
                check_finite_states(hidden, name)

    def _block(
        self, index: int, number: int, states: Tensor, weights: Sequence[Tensor], *, last: bool
    ) -> Iterator[Tensor]:
        """Take sequence `number` back through a block: note the gradient of its inputs, yield those of its weights,
        float32."""
        states = states.to(self.model.device).requires_grad_()
        with torch.enable_grad():
            if index + 1 == len(self.blocks):
                output = self._last_block_loss(self.sequences[number], states)
                power = math.ceil(math.log2(states.shape[1])) + _HEADROOM if states.dtype == torch.float16 else 0
                start = _Scaled(torch.full_like(output, 2.0**power), power)
            else:
                output = run_block(self.modules[index], states, self.segment.calls[number][index])
                given = self.gradients[number]
                assert given is not None
                start = given
        found, power = _gradients(output, [*weights] if last else [*weights, states], start)
        self.gradients[number] = None if last else _Scaled.of(found.pop(), power)
        for weight, gradient in zip(weights, found, strict=True):
            gradient = torch.zeros_like(weight) if gradient is None else gradient
            yield (
                gradient
                if power == 0 and gradient.dtype == torch.float32
                else torch.ldexp(gradient.float(), torch.tensor(-power))
            )

    def _last_block_loss(self, sequence: Batch, states: Tensor) -> Tensor:
        """The model's own loss on a sequence, with `states` as the inputs of its last block and no block before it."""

        def stub(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def passing(*args: Any, **kwargs: Any) -> Any:
                return self.segment.returned(args[0] if args else kwargs["hidden_states"])

            def real(*args: Any, **kwargs: Any) -> Any:
                return forward(states, *args[1:], **{key: x for key, x in kwargs.items() if key != "hidden_states"})

            return real if index + 1 == len(self.blocks) else passing

        with stubbed(self.blocks, stub):
            return self.loss(self.model, sequence)


@dataclass(frozen=True)
class _Scaled:
    """A gradient times 2 ** power."""

    value: Tensor
    power: int

    @classmethod
    def of(cls, value: Tensor, power: int) -> "_Scaled":
        """The gradient value * 2 ** -power; in float16 brought near one."""
        largest = float(value.abs().max()) if value.dtype == torch.float16 else 0.0
        if largest == 0 or not math.isfinite(largest):
            return cls(value, power)
        up = -math.frexp(largest)[1]
        return cls(torch.ldexp(value.float(), torch.tensor(up)).half(), power + up)


def _gradients(output: Tensor, wanted: Sequence[Tensor], start: _Scaled) -> tuple[list[Any], int]:
    """The gradients of `wanted`, times 2 ** power, and that power; in float16 from a smaller start where they would
    overflow."""
    half = wanted[-1].dtype == torch.float16
    found: list[Any] = []
    power = start.power
    for lower in _LOWER if half else (0,):
        seed, power = (start.value * 2.0**-lower if lower else start.value), start.power - lower
        found = list(torch.autograd.grad(output, wanted, seed, retain_graph=half, allow_unused=True))
        if not half or all(gradient is None or bool(gradient.isfinite().all()) for gradient in found):
            break
    return found, power


def _parameter(layer: Layer) -> nn.Parameter:
    parameter: nn.Parameter = getattr(layer.module, layer.parameter)
    return parameter


@contextmanager
def _differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)


def _checked(layer: Layer, value: Tensor) -> Tensor:
    """The part of a parameter's statistic that belongs to `layer`, [out, in]; raises JobError when it is not finite."""
    value = value if layer.expert is None else value[layer.expert]
    if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
        raise JobError(
            f"The gradients of {layer.name} hold NaN or infinity. Run in a wider type (--dtype float32), or with "
            "mode=paper."
        )
    return value.T if layer.transposed else value
