"""The calls that a model makes of its blocks, captured without running the blocks.

The model runs with its blocks replaced by stubs that note their arguments and pass the hidden states on unchanged. That
is right for blocks that hand their hidden states straight to the next one: one *segment*. A model that changes hidden
states between two blocks, or feeds a block with another output of an earlier one, ends the segment there. Every
architecture that can be pruned today is one segment; what is not is refused by name (`capture`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.config import call_options
from billhook.architectures.experts import observable_experts
from billhook.architectures.stacks import blocks_of
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch, main_input, model_inputs, select_rows
from billhook.engine.replay import Call
from billhook.errors import BillhookError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Segment:
    """Blocks that pass hidden states straight on: their calls, `calls[batch][block]`, without the hidden states.

    `returned` puts hidden states [rows, length, width] in the form in which the blocks return them.
    """

    calls: list[list[Call]]
    returned: Callable[[Tensor], Any]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model without dropout, and restore every module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def stubbed(blocks: Mapping[str, nn.Module], stub: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Replace each block's `forward` by `stub(index, forward)`, and restore it afterwards."""

    def restore(block: nn.Module, own: Any) -> None:
        if own is None:
            del block.forward
        else:
            block.forward = own

    with ExitStack() as stack:
        for index, block in enumerate(blocks.values()):
            stack.callback(restore, block, block.__dict__.get("forward"))
            block.forward = stub(index, block.forward)
        yield


def capture(
    model: PreTrainedModel,
    blocks: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    hidden: list[Tensor] | ActivationStore,
) -> Segment:
    """Capture the calls of all blocks for every batch; append the hidden states that enter the first one to `hidden`.

    Costs the embedding of each batch, and one run of one block. Raises BillhookError for a model that changes hidden
    states between two blocks.
    """
    calls: list[list[Call]] = []
    extra: list[tuple[Any, ...] | None] = []  # what a block returns after the hidden states; None for a bare tensor
    passed: list[Tensor] = []  # the hidden states that the last stub returned
    names = list(blocks)

    def returned(states: Tensor) -> Any:
        return states if extra[0] is None else (states, *extra[0])

    def stub(index: int, forward: Forward) -> Forward:
        def note(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            states, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if index == 0:
                hidden.append(states)
                calls.append([])
            elif states is not passed[-1] or len(calls[-1]) != index:
                raise BillhookError(
                    f"{type(model).__name__} changes the hidden states between {names[index - 1]} and {names[index]}: "
                    "models that do more between their blocks than pass on what one returns cannot be pruned yet."
                )
            if not extra:
                result = forward(states, *rest, **kwargs)
                extra.append(result[1:] if isinstance(result, tuple) else None)
            shared = calls[-2][index] if len(calls) > 1 else None
            calls[-1].append(_share(Call(rest, kwargs), shared))
            passed[:] = [states.view_as(states)]  # a new object, to recognize it in the next call
            return returned(passed[-1])

        return note

    options = call_options(model, base=True)
    with stubbed(blocks, stub):
        for batch in batches:
            model.base_model(**model_inputs(model, batch), **options)
    return Segment(calls, returned)


def predictor(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module], returned: Callable[[Tensor], Any]
) -> Callable[[Tensor], Tensor]:
    """The model's own final norm and head: logits [rows, length, classes] of the last block's output.

    Needs a model with token inputs, whose head treats every position by itself.
    """

    def predict(states: Tensor) -> Tensor:
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with stubbed(blocks, lambda index, forward: lambda *args, **kwargs: returned(states.to(model.dtype))):
            logits: Tensor = model(input_ids=ids, **call_options(model)).logits
        return logits

    return predict


@torch.no_grad()
def single_row_calls(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[int, list[Call]]:
    """The calls of all blocks for the first row of a batch, by the length of its rows."""
    lengths = {main_input(model, batch).shape[1]: select_rows(batch, slice(0, 1)) for batch in batches}
    with observable_experts(model), evaluating(model):
        return {length: capture(model, blocks_of(model), [row], []).calls[0] for length, row in lengths.items()}


def _share(call: Call, previous: Call | None) -> Call:
    """Replace arguments that equal those of the previous batch, so that masks and rotary tables are held once."""
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
