"""Which blocks of a model to drop whole.

* `kl`: one after another, each time the block without which the model's predictions differ least from the dense model's
  (KL divergence of the next-token predictions on some calibration windows). Blocks that are useless only together are
  not found. Costs a forward pass for every block, and then some for every block dropped: a divergence does not fall
  when more blocks are gone, so those that were too large before are not computed again (lazy greedy; Minoux, 1978).
  A pass begins behind the block that is left out, as all before it is known: half a pass, and in memory the inputs of
  all blocks.
* `angular`: the blocks that turn the hidden states least (Men et al., "ShortGPT: Layers in Large Language Models are
  More Redundant Than You Expect", arXiv:2403.03853: 1 - cosine of a block's input and output, mean over tokens). One
  pass.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from billhook.ambient import same_random_numbers
from billhook.architectures.stacks import blocks_of
from billhook.distributed.collectives import all_reduce_
from billhook.engine.batch import select_rows
from billhook.engine.capture import Forward, stubbed
from billhook.engine.removal import Dropped, dropping
from billhook.engine.replay import run_block
from billhook.engine.walk import walk
from billhook.errors import BillhookError
from billhook.evaluation.quality import Reference
from billhook.steps.request import Opened

BlockChoice = Literal["kl", "angular"]
WINDOWS = 8  # of calibration text, on which predictions are compared


class BlockOrder:
    """The blocks of a model in the order in which they are dropped, found as far as it is asked for.

    The model is entirely in memory and has calibration samples.
    """

    def __init__(self, opened: Opened, by: BlockChoice, progress: Callable[[str], None] = lambda block: None) -> None:
        self._opened, self._by, self._progress = opened, by, progress
        self._order: list[int] = []
        # of each block that is left: without it, at the last time that this was computed
        self._losses = dict.fromkeys(range(len(blocks_of(opened.model))), 0.0)

    def first(self, number: int) -> list[int]:
        """The numbers of the first `number` blocks to drop, sorted.

        Raises BillhookError where no block would go or none would stay.
        """
        count = len(blocks_of(self._opened.model))
        if not 0 < number < count:
            raise BillhookError(f"{number} of {count} blocks cannot go: at least one goes and one stays. Remove less.")
        if self._by == "angular" and not self._order:
            turned = _turned(self._opened)
            self._order = sorted(range(count), key=turned.__getitem__)
        if len(self._order) < number:
            reference = self._reference  # of the whole model
            with dropping(self._opened.model, range(count)) as blocks:
                while len(self._order) < number:
                    self._order.append(self._next(blocks, reference))
                    del self._losses[self._order[-1]]
        return sorted(self._order[:number])

    @cached_property
    def _reference(self) -> Reference:
        """The dense model's predictions."""
        samples, model = self._opened.samples, self._opened.model
        assert samples is not None
        some = select_rows(samples.batch, slice(0, WINDOWS))
        return Reference.of(model, some, self._opened.task, samples.source, held_out=False)

    def _next(self, blocks: Mapping[int, Dropped], reference: Reference) -> int:
        """The block without which the model loses least, beside those that are dropped already."""
        model, names, fresh = self._opened.model, list(blocks_of(self._opened.model)), dict[int, float]()
        _drop(blocks, self._order)
        with same_random_numbers():
            inputs = [list(block.inputs) for block in walk(model, reference.batches)]
        for index in sorted(self._losses, key=self._losses.__getitem__):
            if fresh and self._losses[index] >= min(fresh.values()):
                break
            _drop(blocks, {*self._order, *range(index + 1)})
            with same_random_numbers(), _passing_on(model, index, inputs[0], inputs[index]):
                kl = reference.compare(model).divergence
            fresh[index] = float("inf") if kl is None else kl
            self._progress(f"{len(self._order) + 1} to drop, {names[index]}")
        self._losses |= fresh
        return min(fresh, key=fresh.__getitem__)


def _drop(blocks: Mapping[int, Dropped], dropped: Collection[int]) -> None:
    """Drop these of the `blocks`, and no others."""
    for index, block in blocks.items():
        block.active = index in dropped


@contextmanager
def _passing_on(
    model: PreTrainedModel, index: int, inputs: Sequence[Tensor], states: Sequence[Tensor]
) -> Iterator[None]:
    """Let block number `index`, which is dropped with all before it, pass on `states` for these `inputs` of the model's
    first block, for a `with` block."""

    def stub(_: int, forward: Forward) -> Forward:
        def passing_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            known = zip(inputs, states, strict=True)
            return forward(next(s for x, s in known if torch.equal(x, hidden_states)), *args, **kwargs)

        return passing_on

    name, block = list(blocks_of(model).items())[index]
    with stubbed({name: block}, stub):
        yield


@torch.no_grad()
def _turned(opened: Opened) -> list[float]:
    """1 - cosine of the input and output of each block, mean over tokens."""
    found = []
    for block in walk(opened.model, opened.batches, resources=opened.resources):
        total, tokens = 0.0, 0
        for states, call in zip(block.inputs, block.calls, strict=True):
            similar = cosine_similarity(states.float(), run_block(block.module, states, call).float(), dim=-1)
            total, tokens = total + float((1 - similar).sum()), tokens + similar.numel()
        everywhere = all_reduce_(torch.tensor([total, float(tokens)], dtype=torch.float64))
        found.append(float(everywhere[0] / everywhere[1]))
    return found
