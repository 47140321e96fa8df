"""The dense model's hidden states beside those of the model that is being pruned, and how far the two have drifted.

A second stream of hidden states passes through every block as it was before it was pruned. The layers of a block are
visited group by group in running order, layers with the same input together; a group is observed after the groups
before it are pruned. Besides the statistics of its inputs X, with X' the inputs of the same tokens in the dense model,
a layer then has

    drift = (X' - X)^T X,   and, if its output is added to the residual stream R,   stream_drift = (R' - R)^T X

which is what the layer would have to correct for the stream to be that of the dense model. Whether a layer writes into
the stream is found by experiment: shift its output by a hundred times the size of the stream; if it writes, the block's
output shifts by the same amount. R' - R is the difference of the block's inputs for the first layer that writes, and of
its outputs for a layer of the last group (less the effect of that layer's own input drift); in between it is not known.

Memory: a copy of the block's prunable weights, and hidden states as large as the walk's. A block runs twice per group,
usually not to its end. Experts have no drift, because the two models may route other tokens to them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import all_reduce_, gather
from billhook.engine.activation_store import ActivationStore
from billhook.engine.observer import Observer, noting
from billhook.engine.replay import Call, run_block
from billhook.engine.resources import Resources
from billhook.methods.statistics import Collector, LayerStats

Stage = tuple[list[Layer], dict[str, LayerStats]]  # some layers of a block, and their statistics by layer name
_SHIFT = 100.0  # of a trial, relative to the size of the stream
_TOLERANCE = 0.1  # relative difference of two shifts that are taken as equal


class DenseStream:
    """The dense model's stream beside a walk that changes weights; `hidden` are the inputs of the next dense block."""

    def __init__(self, hidden: ActivationStore, resources: Resources) -> None:
        """Start from the hidden states that enter the first block."""
        self.hidden = resources.activations()
        for states in hidden:
            self.hidden.append(states)

    def advance(self, block: nn.Module, calls: Sequence[Call]) -> None:
        """Pass the stream through a block that is still dense."""
        for i, call in enumerate(calls):
            self.hidden[i] = run_block(block, self.hidden[i], call)

    @torch.no_grad()
    def stages(
        self,
        block: nn.Module,
        layers: list[Layer],
        statistics: Sequence[str],
        hidden: ActivationStore,
        calls: Sequence[Call],
    ) -> Iterator[Stage]:
        """Yield groups of layers in running order with the statistics of their inputs; the caller prunes each group.

        Iterate to the end: the stream then has passed through the block with the weights it had at first.
        """
        dense = {id(p): (p, p.detach().clone()) for p in (getattr(layer.module, layer.parameter) for layer in layers)}
        finder = Observer(layers, (), wanted=True)
        with finder:
            run_block(block, hidden[0], calls[0])
        groups, first = finder.groups(), True
        for number, group in enumerate(groups):
            last = number + 1 == len(groups)
            if group[0].name not in finder.linear:
                observer = Observer(group, statistics, wanted=False)
                for h, call in zip(hidden, calls, strict=True):
                    with observer:
                        run_block(block, h, call)
                yield group, observer.stats()
                continue
            writes = _is_writer(block, group[0], hidden[0], calls[0])
            pair = _Pair(group[0], statistics, "end" if writes and last else "start" if writes and first else None)
            first = first and not writes
            for i, call in enumerate(calls):
                pair.add(block, dense.values(), (self.hidden[i], hidden[i]), call)
            yield group, pair.stats(group)
        with _values(dense.values()):
            self.advance(block, calls)


def _is_writer(block: nn.Module, layer: Layer, hidden: Tensor, call: Call) -> bool:
    """Whether a layer's output is added unchanged to the block's output; process 0 decides for all processes."""
    if layer.shape[0] != hidden.shape[-1]:
        return False
    plain = run_block(block, hidden, call).float()
    direction = torch.linspace(-1, 1, layer.shape[0], device=hidden.device).roll(layer.shape[0] // 3)
    shift = (_SHIFT * max(hidden.float().square().mean(), plain.square().mean()) ** 0.5 * direction).to(hidden.dtype)
    handle = layer.module.register_forward_hook(lambda module, args, output: output + shift)
    try:
        shifted = run_block(block, hidden, call).float() - plain
    finally:
        handle.remove()
    return gather(bool((shifted - shift).norm() < _TOLERANCE * shift.float().expand_as(shifted).norm()))[0]


class _Pair:
    """Statistics of one layer input in both streams; `written`: at which end of the block the streams are compared."""

    def __init__(self, layer: Layer, statistics: Sequence[str], written: str | None) -> None:
        self._layer, self._written = layer, written
        self._collector = Collector(tuple(statistics), layer.shape[1], layer.weight.device)
        self._sum = torch.zeros(layer.shape, device=layer.weight.device) if written else None

    def add(
        self, block: nn.Module, dense: Iterable[tuple[Tensor, Tensor]], streams: tuple[Tensor, Tensor], call: Call
    ) -> None:
        """Add a batch; `streams` are the inputs of the dense and of the pruned block."""
        whole, ends = self._written == "end", list(streams)
        with _values(dense), noting([self._layer], whole) as there:
            ends[0] = run_block(block, streams[0], call)
        with noting([self._layer], whole) as here:
            ends[1] = run_block(block, streams[1], call)
        x = here[self._layer.name]
        self._collector.add(x, there[self._layer.name])
        if self._sum is not None:
            error = (ends[0] - ends[1]).flatten(0, -2).float()
            self._sum.addmm_(error.T, x.flatten(0, -2).float())

    def stats(self, group: Sequence[Layer]) -> dict[str, LayerStats]:
        """The statistics by layer name, over all processes."""
        self._collector.merge()
        found = {layer.name: self._collector.named(layer.name) for layer in group}
        if self._sum is not None:
            name, drift = self._layer.name, all_reduce_(self._sum)
            own = found[name].drift
            if self._written == "end" and own is not None:  # remove the effect of this layer's own input drift
                drift -= self._layer.weight.float() @ own
            found[name] = replace(found[name], stream_drift=drift)
        return found


@contextmanager
def _values(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Give parameters other values, and restore theirs afterwards."""
    values = list(values)
    own = [p.data for p, _ in values]
    for p, value in values:
        p.data = value
    try:
        yield
    finally:
        for (p, _), value in zip(values, own, strict=True):
            p.data = value
