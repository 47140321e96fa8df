"""The dense model's hidden states during pruning, and how far those of the pruned model have drifted from them.

A second stream of hidden states passes through every block as it was before pruning. The layers of a block are visited
in groups with the same input, in running order; the statistics of a group are collected after the earlier groups are
pruned. With X the inputs of a layer and X' those of the same tokens in the dense model, the statistics include

    drift = (X' - X)^T X,   and, if its output is added to the residual stream R,   stream_drift = (R' - R)^T X

which the layer would have to correct to restore the dense model's stream. Whether a layer writes into the stream is
found by experiment, once for blocks of the same modules: its output is shifted by a hundred times the size of the
stream; if it writes, the block's output shifts by the same amount. R' - R is the difference of the block's inputs for
the first layer that writes, and of its outputs for the layer that is alone in the last group, whose own input drift
these include: it has no `drift`, which would be the most expensive of all. In between R' - R is not known.

Where R' - R is known, a token whose mean square in R' is m times the median of its sequence, m > 1, counts 1 / m in
`gram` and both drifts, as the norm of the next block divides by it: otherwise the few tokens with huge activations that
large models have (Sun et al. 2024, "Massive Activations in Large Language Models", arXiv:2402.17762) are corrected at
the cost of all others.

Memory: a copy of the block's prunable weights, and hidden states as large as those of the walk. A block runs twice per
group, usually not to its end; where it runs to its end for the last group, that advances the dense stream too.
Experts have no drift, because the two models may route different tokens to them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import all_reduce_, gather
from billhook.engine.activation_store import ActivationStore
from billhook.engine.flow import Flow
from billhook.engine.observer import Observer, noting
from billhook.engine.replay import Call, run_block
from billhook.engine.restore import exchanged
from billhook.methods.statistics import Collector, LayerStats

Stage = tuple[list[Layer], dict[str, LayerStats]]  # some layers of a block, and their statistics by layer name
Value = tuple[Tensor, Tensor]  # a parameter and its dense value
_SHIFT = 100.0  # relative to the size of the stream
_TOLERANCE = 0.1  # relative difference up to which two shifts count as equal


class DenseStream:
    """The dense model's stream in a walk that changes weights."""

    def __init__(self, flow: Flow) -> None:
        """Start from the inputs of the first block in `flow`."""
        self.flow = flow.branch()
        self._writers: dict[tuple[str, str], bool] = {}  # by block, as printed, and layer

    @property
    def hidden(self) -> ActivationStore:
        """The inputs of the next dense block."""
        return self.flow.hidden

    def advance(self, block: nn.Module, index: int) -> None:
        """Pass the stream through block number `index`, which is still dense."""
        self.flow.advance(block, index)

    @torch.no_grad()
    def stages(
        self,
        block: nn.Module,
        index: int,
        layers: list[Layer],
        names: Sequence[str],
        pruned: Flow,
    ) -> Iterator[Stage]:
        """Yield groups of layers of block number `index` in running order with the statistics `names` of their inputs
        in the `pruned` flow; the caller prunes each.

        At the end of the iteration the stream has passed through the block with its original weights.
        """
        hidden, calls = pruned.hidden, pruned.calls(index)
        if not calls:
            yield layers, {}
            return
        dense = {id(p): (p, p.detach().clone()) for p in (layer.stored for layer in layers)}
        finder, rows = Observer(layers, (), wanted=True), sum(map(len, hidden))
        with finder:
            run_block(block, hidden[0], calls[0])
        groups, first, advanced = finder.groups(), True, False
        for number, group in enumerate(groups):
            last = number + 1 == len(groups)
            if group[0].name not in finder.linear:
                observer = Observer(group, names, False, rows)
                for h, call in zip(hidden, calls, strict=True):
                    with observer:
                        run_block(block, h, call)
                yield group, observer.stats()
                continue
            writes, last = self._writes(block, group[0], hidden[0], calls[0]), last and len(group) == 1
            pair = _Pair(group[0], names, "end" if writes and last else "start" if writes and first else None)
            first, advanced = first and not writes, writes and last
            for i, pair_of_calls in enumerate(zip(self.flow.calls(index), calls, strict=True)):
                output = pair.add(block, dense.values(), (self.flow, pruned), i, pair_of_calls)
                if advanced:
                    self.hidden[i] = output
            if advanced:
                dense.clear()  # no longer needed, and as large as the block
            yield group, pair.stats(group, rows)
        if not advanced:
            with exchanged(dense.values()):
                self.advance(block, index)

    def _writes(self, block: nn.Module, layer: Layer, hidden: Tensor, call: Call) -> bool:
        """Whether a layer writes into the stream, tried once for blocks of the same modules.

        A block with a scale or gate of its own, a vector that is neither weight nor bias, is tried every time.
        """
        path = next(name for name, module in block.named_modules() if module is layer.module)
        small = {name.rpartition(".")[2] for name, p in block.named_parameters() if p.ndim < 2}
        key = repr(block), path
        if key not in self._writers or small - {"weight", "bias"}:
            self._writers[key] = _is_writer(block, layer, hidden, call)
        return self._writers[key]


def _is_writer(block: nn.Module, layer: Layer, hidden: Tensor, call: Call) -> bool:
    """Whether a layer's output is added unchanged to the block's output; process 0 decides for all."""
    if layer.is_convolution or layer.shape[0] != hidden.shape[-1]:
        return False
    plain, ordered = run_block(block, hidden, call).float(), False
    direction = torch.linspace(-1, 1, layer.shape[0], device=hidden.device).roll(layer.shape[0] // 3)
    shift = (_SHIFT * max(hidden.float().square().mean(), plain.square().mean()) ** 0.5 * direction).to(hidden.dtype)

    def move(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal ordered  # windows of Swin hold the stream's tokens in another order
        ordered = args[0].shape[:-1] in (hidden.shape[:-1], hidden.flatten(0, -2).shape[:-1])
        return output + shift

    handle = layer.module.register_forward_hook(move)
    try:
        shifted = run_block(block, hidden, call).float() - plain
    finally:
        handle.remove()
    return gather(ordered and bool((shifted - shift).norm() < _TOLERANCE * shift.float().expand_as(shifted).norm()))[0]


class _Pair:
    """Statistics of one layer input in both streams; `written` is the end of the block where streams are compared."""

    def __init__(self, layer: Layer, statistics: Sequence[str], written: str | None) -> None:
        self._layer, self._written = layer, written
        names = tuple(name for name in statistics if written != "end" or name != "drift")
        self._collector = Collector(names, layer.shape[1], layer.weight.device)
        self._sum = torch.zeros(layer.shape, device=layer.weight.device) if written else None

    def add(
        self, block: nn.Module, dense: Iterable[Value], flows: tuple[Flow, Flow], batch: int, calls: tuple[Call, Call]
    ) -> Tensor:
        """Add a batch of the dense and of the pruned flow, with the calls of their blocks.

        Returns what the dense block gives, if its end is where streams are compared; its input otherwise.
        """
        whole, ends = self._written == "end", [flow.hidden[batch] for flow in flows]
        with exchanged(dense), noting([self._layer], whole) as there:
            ends[0] = flows[0].run(batch, block, calls[0])
        with noting([self._layer], whole) as here:
            ends[1] = flows[1].run(batch, block, calls[1])
        x, dense_x = here[self._layer.name], there[self._layer.name]
        if self._sum is not None:
            root = token_weights(ends[0]).sqrt()
            x, dense_x = (v * root.view(*v.shape[:-1], 1) for v in (x, dense_x))
            error = (ends[0] - ends[1]).float() * root
            self._sum.addmm_(error.flatten(0, -2).T, x.flatten(0, -2))
        self._collector.add(x, dense_x)
        return ends[0]

    def stats(self, group: Sequence[Layer], rows: int) -> dict[str, LayerStats]:
        """The statistics by layer name, over all processes; `rows` are the sequences of this one."""
        self._collector.merge()
        everywhere = int(all_reduce_(torch.tensor(rows)))
        found = {layer.name: self._collector.stats(layer.name, everywhere) for layer in group}
        if self._sum is not None:
            name = self._layer.name
            found[name] = replace(found[name], stream_drift=all_reduce_(self._sum))
        return found


def token_weights(hidden: Tensor) -> Tensor:
    """How much each token of hidden states [rows, ..., width] counts, float32 [rows, ..., 1], at most 1.

    Those of [tokens, width] are one sequence.
    """
    squares = hidden.float().square().mean(-1, keepdim=True)
    sequences = squares.flatten(1) if hidden.dim() > 2 else squares.view(1, -1)
    typical = sequences.median(1).values.view(-1, *[1] * (hidden.dim() - 1))
    return (typical / squares).where((squares > typical) & (typical > 0), 1)
