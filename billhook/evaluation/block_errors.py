"""The relative error of each block's output, ||Y - Y_dense||^2 / ||Y_dense||^2.

Later blocks pass on and amplify the errors of earlier ones ("error explosion" in ATP, Huang et al. 2025,
arXiv:2502.14770); the growth with depth shows the effect of an allocation, but not that on the predictions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.config import call_options, without_head
from billhook.architectures.stacks import blocks_of
from billhook.engine.batch import Batch, model_inputs, rows_of, select_rows
from billhook.engine.replay import states_of

WINDOWS = 8  # windows compared; their hidden states after every block are in memory at once


@torch.no_grad()
def block_outputs(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """The outputs of every block, float32 [windows, length, width], for the first `WINDOWS` rows of a batch."""
    blocks = blocks_of(model).values()
    outputs: list[list[Tensor]] = [[] for _ in blocks]

    def keep(index: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, result: Any) -> None:
            outputs[index].append(states_of(result).float())

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    try:
        with evaluating(model):
            for row in range(min(WINDOWS, rows_of(batch))):
                inputs = model_inputs(model, select_rows(batch, slice(row, row + 1)))
                without_head(model)(**inputs, **call_options(model, base=True))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in outputs]


def block_errors(outputs: Sequence[Tensor], dense: Sequence[Tensor]) -> list[float] | None:
    """The relative squared error of each block's output, for what `block_outputs` gives for a model and the dense one.

    None where one of them has other blocks, as after whole blocks were removed.
    """
    if [y.shape for y in outputs] != [x.shape for x in dense]:
        return None
    return [
        float((y - x).square().sum(dtype=torch.float64) / x.square().sum(dtype=torch.float64))
        for y, x in zip(outputs, dense, strict=True)
    ]
