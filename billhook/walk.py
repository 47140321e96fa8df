"""Walk a model block by block, each block seeing what the blocks before it, as they now are, really produce.

`for block in walk(model, batches, statistics): ...` is the whole protocol: when the loop body runs, `block.stats` holds the statistics
of each layer's inputs, and whatever the body does to the block's weights changes what the next block sees. Each block is replayed
with its own captured call arguments (masks and rotary tables differ between blocks in Gemma 2/3 and GPT-OSS).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from billhook.arch import Layer, find_blocks, find_layers
from billhook.errors import JobError
from billhook.hidden import SPILL_GIB, States
from billhook.ranks import mine
from billhook.stats import Collector, LayerStats
from billhook.streaming import resident

Progress = Callable[[str], None]  # called with the name of each finished layer


@dataclass(frozen=True)
class Call:
    """The arguments of one block's call, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """One transformer block, its prunable layers, its inputs and its layers' statistics.

    `inputs` is one tensor [batch, length, width] a batch, there until the loop goes on; `calls` are the other arguments of each call.
    """

    index: int
    name: str
    module: nn.Module
    layers: list[Layer]
    inputs: Sequence[Tensor] | States
    stats: dict[str, LayerStats]
    calls: Sequence[Call] = ()


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    statistics: Sequence[str] = (),
    *,
    dense: bool = False,
    start: int = 0,
    spill_gib: float = SPILL_GIB,
) -> Iterator[Block]:
    """Yield every block in depth order, or those from block `start` on.

    `batches` are token ids [batch, length] int64, in the order in which statistics accumulate; empty if no statistics are asked.
    `dense=True` promises that the loop body changes no weight, which saves the second pass through each block. Of a model that is
    streamed, a block is in memory while the loop body runs; inputs beyond `spill_gib` GiB are kept on disk.
    Raises JobError when activations are not finite (naming the block or the layer).
    """
    with plain_experts(model), evaluating(model):
        yield from _walk(model, batches, statistics, dense, start, spill_gib)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let the model run without dropout, and put every module's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def plain_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let experts run as one product each, the form that can be observed, and put the model's own implementation back afterwards."""
    before = model.config._experts_implementation
    if before == "eager" or not any(layer.expert is not None for layer in find_layers(model)):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _walk(
    model: PreTrainedModel, batches: Sequence[Tensor], statistics: Sequence[str], dense: bool, start: int, spill_gib: float
) -> Iterator[Block]:
    name, blocks = find_blocks(model)
    by_block: dict[int, list[Layer]] = {}
    for layer in find_layers(model):
        by_block.setdefault(layer.block, []).append(layer)
    hidden, batches = States(spill_gib), mine(batches)
    calls = capture(model, blocks, batches, hidden)[0] if batches else []
    for index, block in enumerate(blocks):
        if index < start and not calls:
            continue
        outputs = hidden
        with resident(model, index, ahead=index + 1):
            if index >= start:
                layers = by_block.get(index, [])
                observer = _Observer(layers, statistics, wanted=dense)
                own = [call[index] for call in calls]
                outputs = _observe(block, hidden, own, observer, dense, spill_gib)
                yield Block(index, f"{name}.{index}", block, layers, hidden, observer.stats(), own)
            if index + 1 < len(blocks):
                if outputs is hidden:
                    for i, call in enumerate(calls):  # in place, so that inputs and outputs of a block are not all held at once
                        hidden[i] = run_block(block, hidden[i], call[index])
                hidden = outputs
                check_outputs(hidden, f"{name}.{index}")


def _observe(block: nn.Module, hidden: States, calls: Sequence[Call], observer: "_Observer", dense: bool, spill_gib: float) -> States:
    """Run a block on its inputs under the observer's eyes; returns its outputs if they are wanted, else the inputs."""
    outputs = States(spill_gib) if dense else hidden
    for h, call in zip(hidden, calls, strict=True) if observer.watches or dense else ():
        with observer:
            output = run_block(block, h, call)
            if dense:
                outputs.append(output)
    return outputs


def check_outputs(hidden: Iterable[Tensor], name: str) -> None:
    """Raise JobError naming the block when its outputs are not finite."""
    if not all(bool(torch.isfinite(h.sum(dtype=torch.float64))) for h in hidden):
        raise JobError(f"The output of {name} holds NaN or infinity. Run in a wider type (--dtype float32) or check the weights.")


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that a block makes of `hidden`."""
    result = block(hidden, *call.args, **call.kwargs)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@contextmanager
def stubbed(blocks: nn.ModuleList, stub: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let `stub(index, forward)` stand in for each block's own `forward`."""

    def put_back(block: nn.Module, own: Any) -> None:
        if own is None:
            del block.forward
        else:
            block.forward = own

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(put_back, block, block.__dict__.get("forward"))
            block.forward = stub(index, block.forward)
        yield


def capture(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[Tensor], hidden: list[Tensor] | States
) -> tuple[list[list[Call]], Callable[[Tensor], Any]]:
    """Run the model with its blocks replaced by stubs that only note their arguments.

    Appends the hidden states that enter the first block to `hidden`, and returns per batch the calls of all blocks, and a function
    that puts hidden states in the form in which a block returns them. Costs an embedding a batch and one real block.
    """
    calls: list[list[Call]] = []
    extra: list[tuple[Any, ...] | None] = []  # what a block returns after the hidden states; None for a bare tensor

    def returned(states: Tensor) -> Any:
        return states if extra[0] is None else (states, *extra[0])

    def stub(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            states, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if index == 0:
                hidden.append(states)
                calls.append([])
            if not extra:
                result = forward(states, *rest, **kwargs)
                extra.append(result[1:] if isinstance(result, tuple) else None)
            shared = calls[-2][index] if len(calls) > 1 else None
            calls[-1].append(_share(Call(rest, kwargs), shared))
            return returned(states)

        return noting

    with stubbed(blocks, stub):
        for batch in batches:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return calls, returned


def _share(call: Call, previous: Call | None) -> Call:
    """Replace arguments that equal the previous batch's by those, so that masks and rotary tables are held once."""
    if previous is None or len(previous.args) != len(call.args):
        return call
    args = tuple(_same(new, old) for new, old in zip(call.args, previous.args, strict=True))
    return Call(args, {key: _same(value, previous.kwargs.get(key)) for key, value in call.kwargs.items()})


def _same(new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return old if isinstance(old, Tensor) and new.dtype == old.dtype and torch.equal(new, old) else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_same(n, o) for n, o in zip(new, old, strict=True))
    return new


class _Seen(Exception):
    """Ends a block's pass when nothing after this point is wanted."""


class _Observer(TorchFunctionMode):
    """Feeds every layer's inputs to a collector while a block runs; entered once a batch.

    Linear modules are watched by hooks. Experts are slices of a 3-D parameter without a module of their own: their products are seen
    as they pass through torch, the slice being known by its place in memory. Layers that share one input tensor (query, key and
    value; gate and up) share one collector, so no statistic is computed twice. Unless the block's output is `wanted`, a pass ends
    as soon as the last layer's input is known (the first pass finds out which that is), which saves that layer's product.
    """

    def __init__(self, layers: Sequence[Layer], statistics: Sequence[str], wanted: bool) -> None:
        super().__init__()
        self._wanted = wanted
        self._layers = layers if statistics else []
        self.watches = bool(statistics)
        self._collectors = {layer.name: Collector(tuple(statistics), layer.shape[1], layer.weight.device) for layer in self._layers}
        self._leaders: dict[str, str] = {}
        self._seen: dict[tuple[int, ...], tuple[str, Tensor]] = {}
        self._experts = {layer.weight.data_ptr(): layer for layer in self._layers if layer.expert is not None}
        self._handles: list[Any] = []
        self._order: list[str] = []  # of the layers in the first pass
        self._complete = False

    def __enter__(self) -> "_Observer":
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
        return func(*args, **(kwargs or {}))

    def _note(self, layer: Layer, x: Tensor) -> None:
        key = (x.data_ptr(), x._version, *x.shape, *x.stride())
        leader, _ = self._seen.setdefault(key, (layer.name, x))  # holding x keeps its address from being reused
        if self._leaders.setdefault(layer.name, leader) != leader:
            raise JobError(f"{layer.name} shares its input with other layers in some batches only: this architecture is not supported yet.")
        if leader == layer.name:
            self._collectors[leader].add(x.detach())
        if not self._complete:
            self._order.append(layer.name)
        elif not self._wanted and not self._experts and layer.name == self._order[-1]:
            raise _Seen

    def stats(self) -> dict[str, LayerStats]:
        """Layer name -> its statistics, over all processes of the run."""
        for name in dict.fromkeys(self._leaders.get(layer.name, layer.name) for layer in self._layers):
            self._collectors[name].merge()
        return {layer.name: self._stats(layer.name) for layer in self._layers}

    def _stats(self, name: str) -> LayerStats:
        try:
            return self._collectors[self._leaders.get(name, name)].stats()
        except JobError as error:
            raise JobError(f"{name}: {error}") from None


_PRODUCTS = frozenset({nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm})
