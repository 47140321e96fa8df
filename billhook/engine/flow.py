"""The hidden states of all batches on their way through the blocks of a model, and the calls of these blocks.

`flow_of` chooses how. With one stack, the calls of all blocks are captured at the start (`billhook.engine.capture`) and
each block is replayed. With several stacks (a vision tower and a decoder, the stages of a Swin, an encoder and a
decoder), what lies between blocks is the model's own code: projectors, merged patches, features that are added between
two blocks of the decoder. There, a forward pass of the whole model runs for every batch in a greenlet, which pauses
where the model calls a block: the walk sees the inputs, changes weights, runs the block, and the pass continues with
its outputs. So the walk equals the model's own forward pass to the last bit, whatever the model does between blocks.

Cost of paused passes: each keeps what its frames hold, among it the inputs of the current block, which are therefore in
memory for all batches, beside those in the store. The head is never reached.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol

from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.config import call_options
from billhook.architectures.stacks import has_one_stack
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch, model_inputs
from billhook.engine.capture import Captured, Extra, Forward, capture, extra_of, returned, split_call, stubbed
from billhook.engine.replay import Call, run_block, states_of
from billhook.errors import BillhookError

Store = Callable[[], ActivationStore]


class Flow(Protocol):
    """`hidden` are the inputs of the current block for all batches, or its outputs until `cross` is called."""

    hidden: ActivationStore
    batches: Sequence[Batch]

    def calls(self, block: int) -> list[Call]:
        """The calls of the current block, one a batch; none where the block is not run."""
        ...

    def following(self, block: int) -> list[Call] | None:
        """The calls of the block after the current one; None where they are not known yet."""
        ...

    def run(self, batch: int, module: nn.Module, call: Call) -> Tensor:
        """The outputs of the current block for a batch."""
        ...

    def advance(self, module: nn.Module, block: int) -> None:
        """Replace the hidden states by the outputs of the current block."""
        ...

    def cross(self, block: int) -> None:
        """Run the model's own code from the outputs of the block before to the inputs of `block`."""
        ...

    def branch(self) -> "Flow":
        """A second flow from the same hidden states; called at the first block."""
        ...

    def form(self, states: Tensor) -> Any:
        """Hidden states in the form in which the last block that ran returns them."""
        ...


def flow_of(model: PreTrainedModel, blocks: Mapping[str, nn.Module], batches: Sequence[Batch], store: Store) -> Flow:
    """Run the model's own code before its first block; raises BillhookError for a model that cannot be walked."""
    if has_one_stack(model) or not batches:
        return ReplayedFlow(model, blocks, batches, store)
    return PausedFlow(model, blocks, batches, store)


class ReplayedFlow:
    """One stack of blocks whose calls are all known."""

    def __init__(
        self, model: PreTrainedModel, blocks: Mapping[str, nn.Module], batches: Sequence[Batch], store: Store
    ) -> None:
        self.batches, self._store, self._last = batches, store, len(blocks) - 1
        self.hidden = store()
        self._captured = Captured([], lambda states: states)
        if batches:
            self._captured = capture(model, blocks, batches, self.hidden)
        self.form = self._captured.returned

    def calls(self, block: int) -> list[Call]:
        """The captured calls."""
        return self._captured.of(block)

    def following(self, block: int) -> list[Call] | None:
        """The captured calls of the next block."""
        return None if block == self._last else self.calls(block + 1)

    def run(self, batch: int, module: nn.Module, call: Call) -> Tensor:
        """Replay a block."""
        return run_block(module, self.hidden[batch], call)

    def advance(self, module: nn.Module, block: int) -> None:
        """Replace the hidden states in place: not all inputs and outputs are in memory at once."""
        for batch, call in enumerate(self.calls(block)):
            self.hidden[batch] = self.run(batch, module, call)

    def cross(self, block: int) -> None:
        """There is nothing between two blocks."""

    def branch(self) -> "ReplayedFlow":
        """A copy."""
        other = copy(self)
        other.hidden = self._store()
        for states in self.hidden:
            other.hidden.append(states)
        return other


class PausedFlow:
    """Forward passes, one a batch, which are paused where the model calls its current block, number `at`."""

    def __init__(
        self, model: PreTrainedModel, blocks: Mapping[str, nn.Module], batches: Sequence[Batch], store: Store
    ) -> None:
        self._model, self._blocks, self.batches, self._store = model, blocks, batches, store
        self.hidden = store()
        self.at = -1
        self._calls: list[Call] = []
        self._extra: list[Extra] = [None] * len(batches)
        self._passes = [greenlet(self._forward) for _ in batches]
        self._resume(batches)

    def calls(self, block: int) -> list[Call]:
        """The calls at which the passes are paused; none of a block that the model does not run."""
        return self._calls if block == self.at else []

    def following(self, block: int) -> list[Call] | None:
        """Not known before the model calls the block."""
        return None

    def run(self, batch: int, module: nn.Module, call: Call) -> Tensor:
        """Run a block, and note what it returns beside its hidden states."""
        result = module(self.hidden[batch], *call.args, **call.kwargs)
        self._extra[batch] = extra_of(result)
        return states_of(result)

    def advance(self, module: nn.Module, block: int) -> None:
        """Run the block, if the model does."""
        calls = self.calls(block)
        if calls:
            outputs = self._store()
            for batch, call in enumerate(calls):
                outputs.append(self.run(batch, module, call))
            self.hidden = outputs

    def cross(self, block: int) -> None:
        """Resume the passes, unless they wait at this block or a later one."""
        if self.at < block:
            outputs = [returned(*pair) for pair in zip(self._extra, self.hidden, strict=True)]
            self.hidden = self._store()
            self._resume(outputs)

    def branch(self) -> "PausedFlow":
        """New passes: a pass cannot be copied."""
        return PausedFlow(self._model, self._blocks, self.batches, self._store)

    def form(self, states: Tensor) -> Any:
        """As for the first batch."""
        return returned(self._extra[0], states)

    def _forward(self, batch: Batch) -> None:
        self._model(**model_inputs(self._model, batch), **call_options(self._model))

    def _stub(self, index: int, forward: Forward) -> Forward:
        def pause(*args: Any, **kwargs: Any) -> Any:
            return getcurrent().parent.switch((index, *split_call(forward, args, kwargs)))

        return pause

    def _resume(self, values: Sequence[Any]) -> None:
        """Give each pass a value, and run it to its next block; stubs are there only while passes run."""
        with stubbed(self._blocks, self._stub):
            found = [each.switch(value) for each, value in zip(self._passes, values, strict=True)]
        places = {len(self._blocks) if one is None else one[0] for one in found}
        name, names = type(self._model).__name__, list(self._blocks)
        if len(places) > 1:
            raise BillhookError(f"{name} cannot be pruned: its batches take different ways through its blocks.")
        before, self.at = self.at, places.pop()
        if self.at <= before:
            raise BillhookError(f"{name} cannot be pruned: it runs {names[self.at]} after {names[before]}.")
        self._calls = [one[2] for one in found if one is not None]
        for one in found:
            if one is not None:
                self.hidden.append(one[1])
