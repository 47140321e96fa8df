"""The arguments with which a model calls its blocks, captured without running all the blocks.

The model runs with stubs in place of its blocks, which record their arguments and return the hidden states unchanged.
This is correct where each block passes its hidden states directly to the next one: such blocks form a *segment*. A
segment ends where the model changes the hidden states between two blocks. Language models are one segment; others are
refused by name. Backbones in stages have several: `Flow.cross` runs the model's own code from the outputs of one
segment to the inputs of the next, with the outputs of all finished segments in the places where the model reads them.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.config import call_options, is_headless
from billhook.architectures.layers import observable_experts
from billhook.architectures.stacks import blocks_of, is_staged
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch, main_input, model_inputs, select_rows
from billhook.engine.replay import Call, run_block
from billhook.errors import BillhookError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Segment:
    """The calls of the blocks from `first` to `stop` (exclusive), which pass their hidden states directly on:
    `calls[batch][block - first]`, without the hidden states.

    `returned` gives hidden states [rows, length, width] the form in which the blocks return them.
    """

    calls: list[list[Call]]
    returned: Callable[[Tensor], Any]
    first: int = 0
    stop: int = 0

    def of(self, block: int) -> list[Call]:
        """The calls of a block, one a batch."""
        return [calls[block - self.first] for calls in self.calls]


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
    *,
    first: int = 0,
    ended: "Ended | None" = None,
) -> Segment:
    """Capture the calls of the blocks of a segment for every batch, and append the inputs of its first block to
    `hidden`.

    `ended` are the outputs of finished segments; the segment begins with block `first`. The cost is the model's code
    outside of its blocks, and one run of one block (in stages: of the segment's blocks with the first batch). Raises
    BillhookError for a model that changes the hidden states between two blocks of a single stack.
    """
    recorder = _Recorder(model, list(blocks), hidden, first, ended or {})
    options = call_options(model, base=True)
    with stubbed(blocks, recorder.stub):
        for batch in batches:
            with suppress(_SegmentEnd):
                model.base_model(**model_inputs(model, batch), **options)
    return Segment(recorder.calls, partial(_returned, recorder.extra.get(first)), first, recorder.stop)


Extra = tuple[Any, ...] | None  # outputs of a block after the hidden states; None where it returns a bare tensor
Ended = dict[int, tuple[Extra, ActivationStore | None]]  # each block passed; outputs of the last one of a segment


class _SegmentEnd(Exception):
    """Ends a pass through the model at the end of a segment."""


class _Recorder:
    """Stubs that record the calls of the blocks of a segment, and the inputs of its first one in `hidden`."""

    def __init__(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        hidden: list[Tensor] | ActivationStore,
        first: int,
        ended: Ended,
    ) -> None:
        self.model, self.names, self.hidden = model, names, hidden
        self.first, self.ended, self.staged = first, ended, is_staged(model)
        self.stop = len(names)
        self.calls: list[list[Call]] = []
        self.extra: dict[int, Extra] = {}  # of the blocks that were run for their form
        self.passed = torch.empty(0)  # the hidden states that the last stub returned

    def stub(self, index: int, forward: Forward) -> Forward:
        """A function in place of a block's `forward`; the first one called runs the block once, for its form."""
        word = next(iter(inspect.signature(forward).parameters))

        def note(*args: Any, **kwargs: Any) -> Any:
            states, rest = (args[0], args[1:]) if args else (kwargs.pop(word), ())
            if index < self.first:  # the model reads only what the last block of a segment returns
                extra, outputs = self.ended[index]
                return _returned(extra, states if outputs is None else outputs[len(self.calls)])
            if index == self.first:
                self.hidden.append(states)
                self.calls.append([])
            elif index == self.stop or states is not self.passed or len(self.calls[-1]) != index - self.first:
                self._end(index)
            changed = self._formed(index, forward, states, Call(rest, kwargs))
            shared = self.calls[-2][index - self.first] if len(self.calls) > 1 else None
            self.calls[-1].append(_share(Call(rest, kwargs), shared))
            if changed or (self.staged and index + 1 == self.stop):
                self._end(index + 1)
            self.passed = states.view_as(states)  # a new object, to recognize it in the next call
            return _returned(self.extra.get(index, self.extra[self.first]), self.passed)

        return note

    def _formed(self, index: int, forward: Forward, states: Tensor, call: Call) -> bool:
        """Run a block whose form has to be found; returns whether it changes the shape of the hidden states."""
        if index in self.extra or (self.extra and not self.staged):
            return False
        result = forward(states, *call.args, **call.kwargs)
        self.extra[index] = result[1:] if isinstance(result, tuple) else None
        return bool((result[0] if isinstance(result, tuple) else result).shape != states.shape)

    def _end(self, index: int) -> None:
        """End the segment before block `index`."""
        if not self.staged:
            name, between = type(self.model).__name__, f"between {self.names[index - 1]} and {self.names[index]}"
            raise BillhookError(f"{name} cannot be pruned: it changes the hidden states {between}.")
        if len(self.calls) > 1 and index != self.stop:
            raise BillhookError(f"{type(self.model).__name__} cannot be pruned: its batches take different ways.")
        self.stop = index
        raise _SegmentEnd


def _returned(extra: Extra, states: Tensor) -> Any:
    """Hidden states in the form in which the blocks return them."""
    return states if extra is None else (states, *extra)


class Flow:
    """The inputs of the current block for all batches, `hidden`, and the calls of the segment that it belongs to."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        store: Callable[[], ActivationStore],
    ) -> None:
        """Run the model's own code before its first block."""
        self.model, self.blocks, self.batches, self.store = model, blocks, batches, store
        self.hidden, self.ended = store(), Ended()
        self.segment = Segment([], lambda states: states, 0, len(blocks))
        if batches:
            self.segment = capture(model, blocks, batches, self.hidden)

    def branch(self) -> "Flow":
        """A second flow from the same hidden states."""
        other = copy(self)
        other.hidden, other.ended = self.store(), dict(self.ended)
        for states in self.hidden:
            other.hidden.append(states)
        return other

    def advance(self, module: nn.Module, block: int) -> None:
        """Replace the hidden states by the outputs of a block, whose shape may differ at the end of a segment."""
        calls = self.segment.of(block)
        if block + 1 == self.segment.stop < len(self.blocks):
            inputs, self.hidden = self.hidden, self.store()
            for states, call in zip(inputs, calls, strict=True):
                self.hidden.append(run_block(module, states, call))
            return
        for i, call in enumerate(calls):  # in place: not all inputs and outputs are in memory at once
            self.hidden[i] = run_block(module, self.hidden[i], call)

    def cross(self, block: int) -> None:
        """Run the model's own code up to `block`, if this is the first of a segment; `hidden` are the outputs of the
        block before it."""
        if block < self.segment.stop:
            return
        form = self.segment.returned(torch.empty(0))
        extra = form[1:] if isinstance(form, tuple) else None
        self.ended |= dict.fromkeys(range(self.segment.first, block - 1), (extra, None))
        self.ended[block - 1] = (extra, self.hidden)
        self.hidden = self.store()
        about: dict[str, Any] = {"first": block, "ended": self.ended}
        self.segment = capture(self.model, self.blocks, self.batches, self.hidden, **about)


def predicts_tokens(model: PreTrainedModel) -> bool:
    """Whether the model has a head that predicts every token separately."""
    return model.main_input_name == "input_ids" and not is_headless(model)


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
    blocks = blocks_of(model)
    with observable_experts(model), evaluating(model):
        if not is_staged(model):
            return {length: capture(model, blocks, [row], []).calls[0] for length, row in lengths.items()}
        return {length: _real_calls(model, blocks, row) for length, row in lengths.items()}


def _real_calls(model: PreTrainedModel, blocks: Mapping[str, nn.Module], row: Batch) -> list[Call]:
    """The calls of all blocks in a pass through the whole model."""
    calls: dict[int, Call] = {}

    def stub(index: int, forward: Forward) -> Forward:
        word = next(iter(inspect.signature(forward).parameters))

        def note(*args: Any, **kwargs: Any) -> Any:
            calls[index] = Call(args[1:], {key: value for key, value in kwargs.items() if key != word})
            return forward(*args, **kwargs)

        return note

    with stubbed(blocks, stub):
        model.base_model(**model_inputs(model, row), **call_options(model, base=True))
    return [calls[index] for index in range(len(blocks))]


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
