"""Walk a model block by block, each block seeing what the blocks before it, as they now are, really produce.

`for block in walk(model, batches, statistics): ...` is the whole protocol: when the loop body runs, `block.stats` holds
the statistics of each layer's inputs, and whatever the body does to the block's weights changes what the next block
sees. Each block is replayed with its own captured call arguments (masks and rotary tables differ between blocks in
Gemma 2/3 and GPT-OSS).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer, find_blocks, find_layers
from billhook.distributed.collectives import shard
from billhook.engine.activation_store import SPILL_GIB, ActivationStore
from billhook.engine.dense_stream import DenseStream, Stage
from billhook.engine.observer import Observer
from billhook.engine.replay import Call, run_block
from billhook.engine.streaming import resident, stream_of
from billhook.errors import BillhookError, JobError
from billhook.methods.statistics import LayerStats

Progress = Callable[[str], None]  # called with the name of each finished layer


@dataclass(frozen=True)
class After:
    """What follows a block: the next one, with the arguments of its calls, or, with `module` None, the final norm and
    the head.

    `predict` makes logits [windows, tokens, vocabulary] of what the last block returns [windows, tokens, width].
    """

    module: nn.Module | None
    calls: Sequence[Call]
    predict: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One transformer block, its prunable layers, its inputs and its layers' statistics.

    `inputs` is one tensor [batch, length, width] a batch, there until the loop goes on; `calls` are the other arguments
    of each call. `stages` are the layers as they are to be pruned, with their statistics: all at once, or, where
    `drift` is among the statistics, group by group (see `billhook.engine.dense_stream`), to be taken once and to the
    end; `stats` are the statistics of a block of one stage. `dense` is what the dense model's block returns for the
    same tokens, where that was asked for; it is known once the stages are taken. `after` is what follows the block in
    the model, in memory only while `resident(model, index + 1)` is entered.
    """

    index: int
    name: str
    module: nn.Module
    layers: list[Layer]
    inputs: Sequence[Tensor] | ActivationStore
    stats: dict[str, LayerStats]
    stages: Iterable[Stage]
    calls: Sequence[Call]
    dense: Sequence[Tensor] | ActivationStore
    after: After


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    statistics: Sequence[str] = (),
    *,
    read_only: bool = False,
    dense_outputs: bool = False,
    start: int = 0,
    spill_gib: float = SPILL_GIB,
) -> Iterator[Block]:
    """Yield every block in depth order, or those from block `start` on.

    `batches` are token ids [batch, length] int64, in the order in which statistics accumulate; empty if no statistics
    are asked. `read_only=True` promises that the loop body changes no weight, which saves the second pass through each
    block; `dense_outputs` asks for what the blocks of the dense model return. Of a model that is streamed, a block is
    in memory while the loop body runs; inputs beyond `spill_gib` GiB are kept on disk. Raises JobError when activations
    are not finite (naming the block or the layer), BillhookError when `drift` or `dense_outputs` is asked for in the
    middle of a model that is in memory as a whole.
    """
    with plain_experts(model), evaluating(model):
        yield from _walk(
            model,
            batches,
            statistics,
            read_only=read_only,
            dense_outputs=dense_outputs,
            start=start,
            spill_gib=spill_gib,
        )


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
    """Let experts run as one product each, the form that can be observed, and put the model's own implementation back
    afterwards."""
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
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    statistics: Sequence[str],
    *,
    read_only: bool,
    dense_outputs: bool,
    start: int,
    spill_gib: float,
) -> Iterator[Block]:
    name, blocks = find_blocks(model)
    by_block: dict[int, list[Layer]] = {}
    for layer in find_layers(model):
        by_block.setdefault(layer.block, []).append(layer)
    hidden, batches = ActivationStore(spill_gib), shard(batches)
    calls, returned = capture(model, blocks, batches, hidden) if batches else ([], lambda states: states)
    predict = predictor(model, blocks, returned)
    drift = "drift" in statistics and not read_only
    stream = DenseStream(hidden, spill_gib) if drift or dense_outputs else None
    if stream is not None and start and stream_of(model) is None:
        raise BillhookError(
            "This model was pruned in part and lost what it was: go on with dense_target=0, "
            "or start with a model directory."
        )
    for index, block in enumerate(blocks):
        if index < start and not calls:
            continue
        outputs, own = hidden, [call[index] for call in calls]
        if stream is not None and index < start:
            with resident(model, index, source=True):
                stream.advance(block, own)
        with resident(model, index, ahead=index + 1):
            if index >= start:
                layers, stats = by_block.get(index, []), dict[str, LayerStats]()
                stages: Iterable[Stage] = [(layers, stats)]
                if stream is not None and drift:
                    stages = stream.stages(block, layers, statistics, hidden, own)
                elif statistics or read_only:
                    observer = Observer(layers if statistics else [], statistics, wanted=read_only)
                    outputs = _observe(block, hidden, own, observer, read_only, spill_gib)
                    stats.update(observer.stats())
                if stream is not None and not drift:
                    stream.advance(block, own)
                there, after = () if stream is None else stream.hidden, _after(blocks, index, calls, predict)
                yield Block(index, f"{name}.{index}", block, layers, hidden, stats, stages, own, there, after)
            if index + 1 < len(blocks):
                if outputs is hidden:
                    for i, call in enumerate(
                        own
                    ):  # in place, so that inputs and outputs of a block are not all held at once
                        hidden[i] = run_block(block, hidden[i], call)
                hidden = outputs
                check_outputs(hidden, f"{name}.{index}")


def _after(
    blocks: nn.ModuleList, index: int, calls: Sequence[Sequence[Call]], predict: Callable[[Tensor], Tensor]
) -> After:
    """What follows block `index`."""
    if index + 1 == len(blocks):
        return After(None, (), predict)
    return After(blocks[index + 1], [call[index + 1] for call in calls], predict)


def _observe(
    block: nn.Module,
    hidden: ActivationStore,
    calls: Sequence[Call],
    observer: Observer,
    read_only: bool,
    spill_gib: float,
) -> ActivationStore:
    """Run a block on its inputs under the observer's eyes; returns its outputs if they are wanted, else the inputs."""
    outputs = ActivationStore(spill_gib) if read_only else hidden
    for h, call in zip(hidden, calls, strict=True):
        with observer:
            output = run_block(block, h, call)
            if read_only:
                outputs.append(output)
    return outputs


def check_outputs(hidden: Iterable[Tensor], name: str) -> None:
    """Raise JobError naming the block when its outputs are not finite."""
    if not all(bool(torch.isfinite(h.sum(dtype=torch.float64))) for h in hidden):
        raise JobError(
            f"The output of {name} holds NaN or infinity. Run in a wider type (--dtype float32) or check the weights."
        )


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
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[Tensor], hidden: list[Tensor] | ActivationStore
) -> tuple[list[list[Call]], Callable[[Tensor], Any]]:
    """Run the model with its blocks replaced by stubs that only note their arguments.

    Appends the hidden states that enter the first block to `hidden`, and returns per batch the calls of all blocks, and
    a function that puts hidden states in the form in which a block returns them. Costs an embedding a batch and one
    real block.
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


def predictor(
    model: PreTrainedModel, blocks: nn.ModuleList, returned: Callable[[Tensor], Any]
) -> Callable[[Tensor], Tensor]:
    """The model's own norm and head alone: logits of what the last block returns; `returned` as `capture` gives it."""

    def predict(states: Tensor) -> Tensor:
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with stubbed(blocks, lambda index, forward: lambda *args, **kwargs: returned(states.to(model.dtype))):
            logits: Tensor = model(input_ids=ids, use_cache=False, **without_routers(model)).logits
        return logits

    return predict


def without_routers(model: PreTrainedModel) -> dict[str, bool]:
    """The argument with which a model leaves out what only its routers' auxiliary loss needs."""
    return {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}


@torch.no_grad()
def calls_of_one(model: PreTrainedModel, batches: Sequence[Tensor]) -> dict[int, list[Call]]:
    """By length, the calls of all blocks for a single window of that many tokens; `batches` are token ids [windows,
    length]."""
    blocks, lengths = find_blocks(model)[1], {ids.shape[1]: ids[:1] for ids in batches}
    with plain_experts(model), evaluating(model):
        return {length: capture(model, blocks, [ids], [])[0][0] for length, ids in lengths.items()}


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
