"""Which blocks of a model to drop whole.

* `kl`: one after another, each time the block without which the model's predictions differ least from the dense model's
  (KL divergence of the next-token predictions on some calibration windows). Blocks that are useless only together are
  not found. Costs a forward pass for every block, and then some for every block dropped: a divergence does not fall
  when more blocks are gone, so those that were too large before are not computed again (lazy greedy; Minoux, 1978).
* `angular`: the blocks that turn the hidden states least (Men et al., "ShortGPT: Layers in Large Language Models are
  More Redundant Than You Expect", arXiv:2403.03853: 1 - cosine of a block's input and output, mean over tokens). One
  pass.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch.nn.functional import cosine_similarity

from billhook.architectures.stacks import blocks_of
from billhook.distributed.collectives import all_reduce_
from billhook.engine.batch import select_rows
from billhook.engine.removal import dropping
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
        while len(self._order) < number:
            self._order.append(self._next())
            del self._losses[self._order[-1]]
        return sorted(self._order[:number])

    @cached_property
    def _reference(self) -> Reference:
        """The dense model's predictions."""
        samples, model = self._opened.samples, self._opened.model
        assert samples is not None
        some = select_rows(samples.batch, slice(0, WINDOWS))
        return Reference.of(model, some, self._opened.task, samples.source, held_out=False)

    def _next(self) -> int:
        """The block without which the model loses least, beside those that are dropped already."""
        model, names = self._opened.model, list(blocks_of(self._opened.model))
        reference, fresh = self._reference, dict[int, float]()
        for index in sorted(self._losses, key=self._losses.__getitem__):
            if fresh and self._losses[index] >= min(fresh.values()):
                break
            with dropping(model, [*self._order, index]):
                kl = reference.compare(model).kl
            fresh[index] = float("inf") if kl is None else kl
            self._progress(names[index])
        self._losses |= fresh
        return min(fresh, key=fresh.__getitem__)


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
