"""Watch what enters the layers of a block while the block runs, and feed it to their statistics.

Linear modules are watched by hooks. Experts are slices of a 3-D parameter without a module of their own: their products
are seen as they pass through torch, the slice being known by its place in memory. Layers that share one input tensor
(query, key and value; gate and up) share one collector, so no statistic is computed twice.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from billhook.architectures.layers import Layer
from billhook.errors import JobError
from billhook.methods.statistics import Collector, LayerStats


class _Seen(Exception):
    """Ends a block's pass when nothing after this point is wanted."""


class Observer(TorchFunctionMode):
    """Feeds every layer's inputs to a collector while a block runs; entered once a batch.

    Unless the block's output is `wanted`, a pass ends as soon as the last layer's input is known (the first pass finds
    out which that is), which saves that layer's product. `drift` among the statistics is passed over: it is of two
    streams, and this sees one.
    """

    def __init__(self, layers: Sequence[Layer], statistics: Sequence[str], wanted: bool) -> None:
        super().__init__()
        self._wanted = wanted
        self._layers = layers
        names = tuple(name for name in statistics if name != "drift")
        self._collectors = {layer.name: Collector(names, layer.shape[1], layer.weight.device) for layer in layers}
        self._leaders: dict[str, str] = {}
        self._seen: dict[tuple[int, ...], tuple[str, Tensor]] = {}
        self._experts = {layer.weight.data_ptr(): layer for layer in layers if layer.expert is not None}
        self._handles: list[Any] = []
        self._order: list[Layer] = []  # in the first pass
        self._complete = False

    def __enter__(self) -> "Observer":
        for layer in self._layers:
            if layer.expert is None:
                self._handles.append(layer.module.register_forward_pre_hook(self._hook(layer)))
        if self._experts:
            super().__enter__()
        return self

    def __exit__(self, kind: Any, *error: Any) -> bool:
        while self._handles:
            self._handles.pop().remove()
        self._seen.clear()
        self._complete = True
        if self._experts:
            super().__exit__(kind, *error)
        return kind is _Seen

    def _hook(self, layer: Layer) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._note(layer, args[0])

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and isinstance(args[1], Tensor) and (layer := self._experts.get(args[1].data_ptr())):
            self._collectors[layer.name].add(args[0].detach())
            if not self._complete:
                self._order.append(layer)
        return func(*args, **(kwargs or {}))

    def _note(self, layer: Layer, x: Tensor) -> None:
        key = (x.data_ptr(), x._version, *x.shape, *x.stride())
        leader, _ = self._seen.setdefault(key, (layer.name, x))  # holding x keeps its address from being reused
        if self._leaders.setdefault(layer.name, leader) != leader:
            raise JobError(
                f"{layer.name} shares its input with other layers in some batches only: this architecture is not "
                "supported yet."
            )
        if leader == layer.name:
            self._collectors[leader].add(x.detach())
        if not self._complete:
            self._order.append(layer)
        elif not self._wanted and not self._experts and self._order and layer is self._order[-1]:
            raise _Seen

    def groups(self) -> list[list[Layer]]:
        """The layers in the order in which the first pass came to them: those of one input together, each kind of
        experts together, and those that it did not come to at the end. Experts are in the order of the model: which
        ones tokens are sent to depends on the text, and so on the process."""
        groups: dict[str, list[Layer]] = {}
        for layer in dict.fromkeys([*self._order, *self._layers]):
            groups.setdefault(layer.kind if layer.expert is not None else self._leaders.get(layer.name, ""), []).append(
                layer
            )
        place = {layer.name: number for number, layer in enumerate(self._layers)}
        return [
            group if group[0].expert is None else sorted(group, key=lambda layer: place[layer.name])
            for group in groups.values()
        ]

    @property
    def linear(self) -> Collection[str]:
        """The names of the linear layers that the first pass came to."""
        return self._leaders

    def stats(self) -> dict[str, LayerStats]:
        """Layer name -> its statistics, over all processes of the run."""
        for name in dict.fromkeys(self._leaders.get(layer.name, layer.name) for layer in self._layers):
            self._collectors[name].merge()
        return {
            layer.name: self._collectors[self._leaders.get(layer.name, layer.name)].named(layer.name)
            for layer in self._layers
        }


_PRODUCTS = frozenset({nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm})


@contextmanager
def noting(layers: Sequence[Layer], whole: bool) -> Iterator[dict[str, Tensor]]:
    """Note, by name, what enters these linear layers while their block runs once; the run ends with the last of them
    unless `whole`."""
    seen: dict[str, Tensor] = {}

    def hook(layer: Layer) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[layer.name] = args[0].detach()
            if len(seen) == len(layers) and not whole:
                raise _Seen

        return note

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(hook(layer)).remove)
        with suppress(_Seen):
            yield seen
