"""Which blocks of a model to drop whole.

* `kl`: one after another, each time the block without which the model's predictions differ least from the dense model's
  (KL divergence of the next-token predictions on some calibration windows). Costs a forward pass for every block and
  block dropped. Blocks that are useless only together are not found.
* `angular`: the blocks that turn the hidden states least (Men et al., "ShortGPT: Layers in Large Language Models are
  More Redundant Than You Expect", arXiv:2403.03853: 1 - cosine of a block's input and output, mean over tokens). One
  pass.
"""

from collections.abc import Callable
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


def choose_blocks(
    opened: Opened, number: int, by: BlockChoice, progress: Callable[[str], None] = lambda block: None
) -> list[int]:
    """The numbers of the blocks to drop, sorted, for a model that is entirely in memory and has calibration samples.

    Raises BillhookError where no block would stay.
    """
    names = list(blocks_of(opened.model))
    if not 0 < number < len(names):
        raise BillhookError(f"{number} of {len(names)} blocks cannot go: at least one goes and one stays. Remove less.")
    if by == "angular":
        turned = _turned(opened)
        return sorted(sorted(range(len(names)), key=turned.__getitem__)[:number])
    samples = opened.samples
    assert samples is not None
    some = select_rows(samples.batch, slice(0, WINDOWS))
    reference = Reference.of(opened.model, some, opened.task, samples.source, held_out=False)
    dropped: list[int] = []
    while len(dropped) < number:
        losses = {}
        for index, name in enumerate(names):
            if index not in dropped:
                with dropping(opened.model, [*dropped, index]):
                    kl = reference.compare(opened.model).kl
                losses[index] = float("inf") if kl is None else kl
                progress(name)
        dropped.append(min(losses, key=losses.__getitem__))
    return sorted(dropped)


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
