"""The arguments with which a model calls its blocks, captured without running all the blocks.

The model runs with stubs in place of its blocks, which record their arguments and return the hidden states unchanged.
This is correct where each block passes its hidden states directly to the next one, as in language models and in plain
vision transformers; a model with one stack that does anything else is refused by name. Models with several stacks are
paused at every block instead (`billhook.engine.flow`).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.config import call_options, is_headless, without_head
from billhook.architectures.layers import observable_experts
from billhook.architectures.stacks import blocks_of, has_one_stack
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch, model_inputs, select_rows
from billhook.engine.replay import Call
from billhook.errors import BillhookError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Captured:
    """The calls of all blocks, `calls[batch][block]`, without the hidden states.

    `returned` gives hidden states [rows, length, width] the form in which the blocks return them.
    """

    calls: list[list[Call]]
    returned: Callable[[Tensor], Any]

    def of(self, block: int) -> list[Call]:
        """The calls of a block, one a batch."""
        return [calls[block] for calls in self.calls]


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
) -> Captured:
    """Capture the calls of all blocks for every batch, and append the inputs of the first block to `hidden`.

    The cost is the model's code outside of its blocks, and one run of one block. Raises BillhookError for a model that
    changes the hidden states between two blocks, or does not run each block once, one after the other.
    """
    recorder = _Recorder(model, list(blocks), hidden)
    options = call_options(model, base=True)
    with stubbed(blocks, recorder.stub):
        for batch in batches:
            recorder.run(without_head(model), {**model_inputs(model, batch), **options})
    return Captured(recorder.calls, partial(returned, recorder.extra))


Extra = tuple[Any, ...] | None  # outputs of a block after the hidden states; None where it returns a bare tensor


class _Recorder:
    """Stubs that record the calls of the blocks, and the inputs of the first one in `hidden`."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], hidden: list[Tensor] | ActivationStore) -> None:
        self.model, self.names, self.hidden = model, names, hidden
        self.calls: list[list[Call]] = []
        self.extra: Extra = None  # of the block that was run for its form
        self.passed = torch.empty(0)  # the hidden states that the last stub returned

    def run(self, forward: Forward, inputs: Mapping[str, Any]) -> None:
        """Record the calls of one batch, of which there must be one for each block, in their order."""
        self.calls.append([])
        forward(**inputs)
        self._check_order(len(self.names))

    def stub(self, index: int, forward: Forward) -> Forward:
        """A function in place of a block's `forward`; the first one called runs the block once, for its form."""

        def note(*args: Any, **kwargs: Any) -> Any:
            states, call = split_call(forward, args, kwargs)
            self._check_order(index)
            if index == 0:
                self.hidden.append(states)
            elif states is not self.passed:
                between = f"between {self.names[index - 1]} and {self.names[index]}"
                raise self._refusal(f"changes the hidden states {between}")
            if len(self.calls) == 1 and index == 0:
                result = forward(states, *call.args, **call.kwargs)
                self.extra = extra_of(result)
            shared = self.calls[-2][index] if len(self.calls) > 1 else None
            self.calls[-1].append(_share(call, shared))
            self.passed = states.view_as(states)  # a new object, to recognize it in the next call
            return returned(self.extra, self.passed)

        return note

    def _check_order(self, index: int) -> None:
        """Raise BillhookError unless all blocks before this one, and no others, have been called for the batch."""
        done = len(self.calls[-1])
        if index < done:
            raise self._refusal(f"runs {self.names[index]} again after {self.names[done - 1]}")
        if index > done:
            raise self._refusal(f"does not run {self.names[done]}")

    def _refusal(self, what: str) -> BillhookError:
        return BillhookError(f"{type(self.model).__name__} cannot be pruned: it {what}.")


def not_run(name: str) -> BillhookError:
    """The error for a block whose inputs are needed and which the model does not run."""
    why = "is not run with these samples, so its inputs are not known"
    return BillhookError(f"{name} {why}: give images with the text, or choose other blocks with --stacks.")


def split_call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, which are the first argument of a block, and its other arguments."""
    if args:
        return args[0], Call(args[1:], kwargs)
    word = next(iter(inspect.signature(forward).parameters))
    return kwargs[word], Call((), {key: value for key, value in kwargs.items() if key != word})


def extra_of(result: Any) -> Extra:
    """What a block returns after its hidden states."""
    return result[1:] if isinstance(result, tuple) else None


def returned(extra: Extra, states: Tensor) -> Any:
    """Hidden states in the form in which the blocks return them."""
    return states if extra is None else (states, *extra)


def predicts_tokens(model: PreTrainedModel) -> bool:
    """Whether the model has a head that predicts every token separately."""
    alone = not getattr(model.config, "is_encoder_decoder", False)
    return model.main_input_name == "input_ids" and alone and not is_headless(model)


def predictor(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module], form: Callable[[Tensor], Any]
) -> Callable[[Tensor], Tensor]:
    """The model's own final norm and head: a function from the last block's output to logits [rows, length, classes].

    `form` gives hidden states the form in which the blocks return them.
    For models with token inputs and a head that treats every position separately.
    """

    def predict(states: Tensor) -> Tensor:
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with stubbed(blocks, lambda index, forward: lambda *args, **kwargs: form(states.to(model.dtype))):
            logits: Tensor = model(input_ids=ids, **call_options(model)).logits
        return logits

    return predict


@torch.no_grad()
def single_row_calls(model: PreTrainedModel, batches: Sequence[Batch]) -> list[list[Call]]:
    """The calls of every block for the first row of each batch, `calls[batch][block]`.

    Batches whose rows have equal shapes, of all their inputs, share the calls of one row.
    """
    blocks, known = blocks_of(model), dict[Any, list[Call]]()
    found = []
    with observable_experts(model), evaluating(model):
        for batch in batches:
            row = select_rows(batch, slice(0, 1))
            shapes = tuple((name, value.shape) for name, value in row.items())
            if shapes not in known:
                one_stack = has_one_stack(model)
                known[shapes] = (
                    capture(model, blocks, [row], []).calls[0] if one_stack else _real_calls(model, blocks, row)
                )
            found.append(known[shapes])
    return found


def _real_calls(model: PreTrainedModel, blocks: Mapping[str, nn.Module], row: Batch) -> list[Call]:
    """The call of every block for a row, in a pass through the whole model."""
    found = [Call((), {})] * len(blocks)

    def stub(index: int, forward: Forward) -> Forward:
        def note(*args: Any, **kwargs: Any) -> Any:
            found[index] = split_call(forward, args, kwargs)[1]
            return forward(*args, **kwargs)

        return note

    with stubbed(blocks, stub):
        model(**model_inputs(model, row), **call_options(model))
    return found


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
