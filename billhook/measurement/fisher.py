"""Fisher information: what a small error of each layer's output costs the model.

    f_l = mean over tokens and outputs of g²,   g = gradient of Σ ln p(y) by the layer's output,   y drawn from p

p are the model's own predictions, and one y is drawn for every scored position. Of a model without predictions, y is
drawn from a normal distribution of variance 1 around its embedding of length 1, whose KL divergence from that around
another embedding, ½ of their squared distance, is the cosine distance. To second order an error d of the
output, independent of g, costs ½ Σ (g · d)² of KL divergence in the mean, so an error that is spread evenly over
tokens and outputs costs ½ f_l per square. That is the Fisher information of Kronecker-factored curvature (Martens &
Grosse 2015, arXiv:1503.05671), with the factor of the outputs reduced to its mean diagonal.

Cost: a forward pass and a backward pass in which every block is run again (`billhook.engine.gradients`). One block at a
time is in memory if the model is streamed. Limits: errors that are large, or aligned with g, cost more or less.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.layers import Layer, observable_experts
from billhook.engine.batch import Batch, main_input, split_rows
from billhook.engine.gradients import Backward, Loss
from billhook.engine.observer import PRODUCTS, factors
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Progress
from billhook.errors import JobError
from billhook.evaluation.divergence import COSINE
from billhook.evaluation.predicting import predicted
from billhook.evaluation.scoring import Scoring


def fisher(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    scoring: Scoring,
    *,
    seed: int = 0,
    resources: Resources = IN_MEMORY,
    progress: Progress = lambda layer: None,
) -> dict[str, float]:
    """f_l by layer name, in nats per square of the output; 0 for an expert that received no token.

    Raises JobError for gradients that are not finite, naming the layer.
    """
    sequences = [row for batch in batches for row in split_rows(batch, 1)]
    backward = Backward(model, sequences, _sampled_loss(scoring, seed), resources)
    found: dict[str, float] = {}
    with observable_experts(model), evaluating(model):
        for index in backward.indices(min(layer.block for layer in layers)):
            chosen = [layer for layer in layers if layer.block == index]
            squares, counts = dict.fromkeys((x.name for x in chosen), 0.0), dict.fromkeys((x.name for x in chosen), 0)
            with _OutputGradients(chosen) as observed:
                for sequence, (_, power) in zip(sequences, backward.block(index, []), strict=True):
                    scale = (main_input(model, sequence).shape[1] * 2.0**-power) ** 2
                    for name, (square, count) in observed.take().items():
                        squares[name] += square * scale
                        counts[name] += count
            for layer in chosen:
                found[layer.name] = squares[layer.name] / max(counts[layer.name], 1)
                if not torch.isfinite(torch.tensor(found[layer.name])):
                    raise JobError(f"The gradients of {layer.name} hold NaN or infinity: use --dtype float32.")
                progress(layer.name)
    return found


def _sampled_loss(scoring: Scoring, seed: int) -> Loss:
    """-Σ ln p(y) / length, but for a constant, with y drawn from p, the same for the same sequences."""
    generator = torch.Generator().manual_seed(seed)

    def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        ((scored, _),) = predicted(model, batch, scoring)
        length = main_input(model, batch).shape[1]
        if scoring.divergence is COSINE:
            noise = torch.randn(scored.shape, generator=generator).to(scored.device)
            return -(noise * normalize(scored.float(), dim=-1)).sum() / length
        log_p = scored.float().log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        return -log_p.gather(1, drawn).sum() / length

    return loss


class _OutputGradients(TorchFunctionMode):
    """Sums of the squared gradients of the outputs of layers, while it is entered."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self._experts = {layer.weight.data_ptr(): layer.name for layer in layers if layer.expert is not None}
        self._modules = [(layer.name, layer.module) for layer in layers if layer.expert is None]
        self._handles: list[Any] = []
        self._found: dict[str, tuple[float, int]] = {}

    def take(self) -> dict[str, tuple[float, int]]:
        """The sum and the number of squares by layer name, since the last time."""
        found, self._found = self._found, {}
        return found

    def __enter__(self) -> "_OutputGradients":
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules]
        if self._experts:
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if self._experts:
            super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in PRODUCTS and isinstance(args[1], Tensor):
            for name, rows in factors(args[0], args[1], self._experts):
                self._watch(name, output, rows)
        return output

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            self._watch(name, output)

        return note

    def _watch(self, name: str, output: Tensor, rows: Any = ...) -> None:
        """Note the gradient of `rows` (an index) of an output when it is computed; the last time counts."""

        def note(gradient: Tensor) -> None:
            own = gradient.detach()[rows]
            self._found[name] = float(own.float().square().sum(dtype=torch.float64)), own.numel()

        if output.requires_grad:
            output.register_hook(note)
