"""The arguments with which a model calls its blocks, captured without running the blocks.

The model runs with stubs in place of its blocks, which record their arguments and return the hidden states unchanged.
This is correct where each block passes its hidden states directly to the next one: such blocks form a *segment*. A
segment ends where the model changes the hidden states between two blocks, or gives a block another output of an earlier
one. Every architecture that can be pruned is one segment; others are refused by name (`capture`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.config import call_options
from billhook.architectures.layers import observable_experts
from billhook.architectures.stacks import blocks_of
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch, main_input, model_inputs, select_rows
from billhook.engine.replay import Call
from billhook.errors import BillhookError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Segment:
    """The calls of blocks that pass their hidden states directly on: `calls[batch][block]`, without the hidden states.

    `returned` gives hidden states [rows, length, width] the form in which the blocks return them.
    """

    calls: list[list[Call]]
    returned: Callable[[Tensor], Any]


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
    """Capture the calls of all blocks for every batch, and append the inputs of the first block to `hidden`.

    The cost is the embedding of each batch, and one run of one block. Raises BillhookError for a model that changes the
    hidden states between two blocks.
    """
    recorder = _Recorder(model, list(blocks), hidden)
    options = call_options(model, base=True)
    with stubbed(blocks, recorder.stub):
        for batch in batches:
            model.base_model(**model_inputs(model, batch), **options)
    return Segment(recorder.calls, partial(_returned, recorder.extra))


class _Recorder:
    """Stubs that record the calls of the blocks, and the inputs of the first one in `hidden`."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], hidden: list[Tensor] | ActivationStore) -> None:
        self.model, self.names, self.hidden = model, names, hidden
        self.calls: list[list[Call]] = []
        self.extra: list[tuple[Any, ...] | None] = []  # outputs of a block after the hidden states; None: bare tensor
        self.passed = torch.empty(0)  # the hidden states that the last stub returned

    def stub(self, index: int, forward: Forward) -> Forward:
        """A function in place of a block's `forward`; the first one called runs the block once, for its form."""

        def note(*args: Any, **kwargs: Any) -> Any:
            states, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if index == 0:
                self.hidden.append(states)
                self.calls.append([])
            elif states is not self.passed or len(self.calls[-1]) != index:
                name, between = type(self.model).__name__, f"between {self.names[index - 1]} and {self.names[index]}"
                raise BillhookError(f"{name} cannot be pruned: it changes the hidden states {between}.")
            if not self.extra:
                result = forward(states, *rest, **kwargs)
                self.extra.append(result[1:] if isinstance(result, tuple) else None)
            shared = self.calls[-2][index] if len(self.calls) > 1 else None
            self.calls[-1].append(_share(Call(rest, kwargs), shared))
            self.passed = states.view_as(states)  # a new object, to recognize it in the next call
            return _returned(self.extra, self.passed)

        return note


def _returned(extra: Sequence[tuple[Any, ...] | None], states: Tensor) -> Any:
    """Hidden states in the form in which the blocks return them."""
    return states if extra[0] is None else (states, *extra[0])


def predictor(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module], returned: Callable[[Tensor], Any]
) -> Callable[[Tensor], Tensor]:
    """The model's own final norm and head: a function from the last block's output to logits [rows, length, classes].

    For models with token inputs and a head that treats every position separately.
    """

    def predict(states: Tensor) -> Tensor:
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with stubbed(blocks, lambda index, forward: lambda *args, **kwargs: returned(states.to(model.dtype))):
            logits: Tensor = model(input_ids=ids, **call_options(model)).logits
        return logits

    return predict


@torch.no_grad()
def single_row_calls(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[int, list[Call]]:
    """The calls of all blocks for a batch of one row, by the length of the row."""
    lengths = {main_input(model, batch).shape[1]: select_rows(batch, slice(0, 1)) for batch in batches}
    with observable_experts(model), evaluating(model):
        return {length: capture(model, blocks_of(model), [row], []).calls[0] for length, row in lengths.items()}


def _share(call: Call, previous: Call | None) -> Call:
    """Reuse arguments that equal those of the previous batch, so that masks and rotary tables are in memory once."""
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
