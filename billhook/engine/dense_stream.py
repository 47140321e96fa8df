"""The dense model beside the one that is being pruned: how far the same tokens have drifted apart, layer by layer.

A second stream of hidden states passes through every block as it was before it was pruned. The layers of a block come
group by group, in running order, those of one input together; each group is observed when the ones before it are
pruned. Of each it is then known, besides the statistics of its inputs X, with X' those of the same tokens in the dense
model,

    drift = (X' - X)^T X,    and where a layer's output is added to the residual stream,    stream_drift = (R' - R)^T X

with R the stream that it is added to: what the layer would have to make up for so that the stream comes out as in the
dense model. Which layers write into the stream is tried: shifting such a layer's output by a hundred times the size of
the stream shifts what the block returns by as much, whatever norms and products come after it. R' - R is the difference
of the block's inputs at the first that writes, and of its outputs at one of the last group (less what its own inputs'
drift does); none is known between.

In memory: the block's prunable weights once more, and hidden states like those of the walk. A block is run twice a
group, and mostly not to its end. Experts have no drift, because other tokens may be sent to them here and there.
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
from billhook.methods.statistics import Collector, LayerStats

Stage = tuple[list[Layer], dict[str, LayerStats]]  # some layers of a block, and by name what is known of their inputs
_SHIFT = 100.0  # times the size of the stream
_LIKE = 0.1  # relative difference of two shifts that counts as none


class DenseStream:
    """The dense model's stream beside a walk that changes weights; `hidden` is what enters the next block that it has
    not passed."""

    def __init__(self, hidden: ActivationStore, spill_gib: float) -> None:
        """`hidden` is what enters the first block."""
        self.hidden = ActivationStore(spill_gib)
        for h in hidden:
            self.hidden.append(h)

    def advance(self, block: nn.Module, calls: Sequence[Call]) -> None:
        """Pass through a block, which is dense."""
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
        """The layers of a block in running order, with the statistics of their inputs; to be taken to the end, pruned
        meanwhile.

        The block is dense at first, and this stream has passed through it, as it was, at the end.
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
    """Whether a layer's output is added, as it is, to what the block returns; process 0 decides for all."""
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
    return gather(bool((shifted - shift).norm() < _LIKE * shift.float().expand_as(shifted).norm()))[0]


class _Pair:
    """Statistics of one input of a block in both streams; `written` says at which end of the block the streams are
    compared."""

    def __init__(self, layer: Layer, statistics: Sequence[str], written: str | None) -> None:
        self._layer, self._written = layer, written
        self._collector = Collector(tuple(statistics), layer.shape[1], layer.weight.device)
        self._sum = torch.zeros(layer.shape, device=layer.weight.device) if written else None

    def add(
        self, block: nn.Module, dense: Iterable[tuple[Tensor, Tensor]], streams: tuple[Tensor, Tensor], call: Call
    ) -> None:
        """Take in a batch; `streams` are the inputs of the dense and of the pruned block."""
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
        """Layer name -> its statistics, over all processes of the run."""
        self._collector.merge()
        found = {layer.name: self._collector.named(layer.name) for layer in group}
        if self._sum is not None:
            name, drift = self._layer.name, all_reduce_(self._sum)
            own = found[name].drift
            if self._written == "end" and own is not None:  # the outputs differ by what this layer's own inputs do, too
                drift -= self._layer.weight.float() @ own
            found[name] = replace(found[name], stream_drift=drift)
        return found


@contextmanager
def _values(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let parameters have other values meanwhile."""
    values = list(values)
    own = [p.data for p, _ in values]
    for p, value in values:
        p.data = value
    try:
        yield
    finally:
        for (p, _), value in zip(values, own, strict=True):
            p.data = value
