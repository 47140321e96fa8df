"""Observe the inputs of the layers of a block while it runs, and feed them to the collectors of statistics.

Linear modules and convolutions are observed by hooks. Experts are slices of a 3-D parameter without a module of their
own: their matrix products are intercepted in torch, and the slice is recognized by its address; where one product is
that of all experts (Llama 4), the rows of an expert that are zero are those of tokens that it does not receive. Layers
that share an input tensor (query, key and value; gate and up) share a collector, so that no statistic is computed
twice.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import all_reduce_
from billhook.errors import JobError
from billhook.methods.statistics import Collector, LayerStats


class _Seen(Exception):
    """Ends a block's pass early."""


class Observer(TorchFunctionMode):
    """Feeds the inputs of every layer to a collector while a block runs; entered once for each batch.

    Unless the block's output is `wanted`, a pass ends at the last layer's input (the first pass determines which layer
    that is), without that layer's product. `drift` is ignored, because it needs two streams. `rows` counts the
    sequences of all batches.
    """

    def __init__(self, layers: Sequence[Layer], statistics: Sequence[str], wanted: bool, rows: int = 0) -> None:
        super().__init__()
        self._layers, self._wanted, self._rows = layers, wanted, rows
        names = tuple(name for name in statistics if name != "drift")
        self._collectors = {layer.name: Collector(names, layer.shape[1], layer.weight.device) for layer in layers}
        self._leaders: dict[str, str] = {}
        self._seen: dict[tuple[Hashable, ...], tuple[str, Tensor]] = {}
        self._experts = {layer.weight.data_ptr(): layer for layer in layers if layer.expert is not None}
        self._handles: list[Any] = []
        self._order: list[Layer] = []  # of the first pass
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
        if func in PRODUCTS and isinstance(args[1], Tensor):
            for layer, rows in factors(args[0], args[1], self._experts):
                if len(x := args[0].detach()[rows]):
                    self._collectors[layer.name].add(x)
                if not self._complete:
                    self._order.append(layer)
        return func(*args, **(kwargs or {}))

    def _note(self, layer: Layer, x: Tensor) -> None:
        key = (x.data_ptr(), x._version, *x.shape, *x.stride(), layer.sees)
        leader, _ = self._seen.setdefault(key, (layer.name, x))  # keeping x prevents the reuse of its address
        if self._leaders.setdefault(layer.name, leader) != leader:
            shares = f"{layer.name} shares its input with other layers in some batches only"
            raise JobError(f"{shares}: this architecture is not supported.")
        if leader == layer.name:
            self._collectors[leader].add(layer.inputs(x.detach()))
        if not self._complete:
            self._order.append(layer)
        elif not self._wanted and not self._experts and self._order and layer is self._order[-1]:
            raise _Seen

    def groups(self) -> list[list[Layer]]:
        """The layers in the order of the first pass, in groups: layers with one input, one kind of experts.

        Layers that the pass did not reach are the last group. Experts are in model order, because the order in which
        they receive tokens depends on the text, and so on the process.
        """
        groups: dict[str, list[Layer]] = {}
        for layer in dict.fromkeys([*self._order, *self._layers]):
            key = layer.kind if layer.expert is not None else self._leaders.get(layer.name, "")
            groups.setdefault(key, []).append(layer)
        numbers = {layer.name: number for number, layer in enumerate(self._layers)}
        for name, group in groups.items():
            if group[0].expert is not None:
                groups[name] = sorted(group, key=lambda layer: numbers[layer.name])
        return list(groups.values())

    @property
    def linear(self) -> Collection[str]:
        """The names of the linear layers and convolutions that the first pass reached."""
        return self._leaders

    def stats(self) -> dict[str, LayerStats]:
        """Layer name -> its statistics, over all processes of the run."""
        leaders = {layer.name: self._leaders.get(layer.name, layer.name) for layer in self._layers}
        for leader in dict.fromkeys(leaders.values()):
            self._collectors[leader].merge()
        rows = int(all_reduce_(torch.tensor(self._rows)))
        return {name: self._collectors[leader].stats(name, rows) for name, leader in leaders.items()}


PRODUCTS = frozenset(
    {nn.functional.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}
)
T = TypeVar("T")


def factors(x: Tensor, weight: Tensor, known: Mapping[int, T]) -> list[tuple[T, Any]]:
    """What is `known` of the weights in a product x · weight, each with the index of its own rows in `x` [..., tokens,
    in] and in the product; `known` is by the address of a weight.

    A `weight` [experts, in, out] is that of all experts, with x [experts, tokens, in]; rows of zeros are those of
    tokens that an expert does not receive. Raises JobError where the experts share one x.
    """
    if weight.ndim != 3 or not known:
        return [(known[weight.data_ptr()], ...)] if weight.data_ptr() in known else []
    parts = [(number, known[p.data_ptr()]) for number, p in enumerate(weight) if p.data_ptr() in known]
    if parts and x.ndim != 3:
        raise JobError("One product of all experts with the same tokens is not supported: leave the experts out.")
    return [(found, (number, x[number].any(-1))) for number, found in parts]


class _Products(TorchFunctionMode):
    """Notes what one weight is multiplied with."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._known, self.seen = {layer.weight.data_ptr(): layer}, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and isinstance(args[1], Tensor):
            self.seen += [args[0].detach()[rows] for _, rows in factors(args[0], args[1], self._known)]
        return func(*args, **(kwargs or {}))


@contextmanager
def products_with(layer: Layer) -> Iterator[list[Tensor]]:
    """Yield a list that a run of the block fills with the inputs [tokens, in] of an expert's layer."""
    with _Products(layer) as products:
        yield products.seen


@contextmanager
def noting(layers: Sequence[Layer], whole: bool) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that a run of the block fills with the inputs of linear layers and convolutions, by name.

    Unless `whole`, the run ends at the last of these layers.
    """
    seen: dict[str, Tensor] = {}

    def hook(layer: Layer) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[layer.name] = layer.inputs(args[0].detach())
            if len(seen) == len(layers) and not whole:
                raise _Seen

        return note

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(hook(layer)).remove)
        with suppress(_Seen):
            yield seen
