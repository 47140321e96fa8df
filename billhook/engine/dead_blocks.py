"""Blocks that no output of a model depends on, such as the last ones of a vision tower of which LLaVA reads an earlier
layer (`vision_feature_layer=-2`).

Found by perturbation: the outputs of a block are replaced by others, and where the model's predictions stay the same to
the last bit, the block is dead. Removing its weights would cost nothing, and give other blocks a smaller share of the
budget, so they are left out of it. In each stack blocks are tried from the last one backwards until one is alive. Cost:
a forward pass of the first batch for each stack, and for each dead block.
"""

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.config import call_options, predictions
from billhook.architectures.layers import observable_experts
from billhook.architectures.stacks import blocks_of, find_stacks, has_one_stack
from billhook.engine.batch import Batch, model_inputs, select_rows
from billhook.engine.capture import Forward, extra_of, not_run, returned, stubbed
from billhook.engine.replay import states_of
from billhook.errors import BillhookError


@torch.no_grad()
def dead_blocks(model: PreTrainedModel, batch: Batch, wanted: Collection[int]) -> dict[int, str]:
    """The dead blocks among the `wanted` ones (indices into `blocks_of`), with their names; none in a single stack.

    `batch` is tried by its first row. Raises BillhookError where it does not reach one of the wanted blocks, and where
    it reaches blocks in another order than that of `blocks_of`, or cannot be run with it.
    """
    if has_one_stack(model):
        return {}
    row, names = select_rows(batch, slice(0, 1)), list(blocks_of(model))
    found, last = dict[int, str](), -1
    with observable_experts(model), evaluating(model):
        expected, ran = _predictions(model, row, None)
        for before, after in pairwise(dict.fromkeys(ran)):
            if after < before:
                who = type(model).__name__
                raise BillhookError(
                    f"{who} cannot be pruned: it runs {names[after]} after {names[before]}, which is defined later. "
                    "Leave one of them out."
                )
        if missing := sorted(set(wanted) - set(ran)):
            raise not_run(names[missing[0]])
        for stack in find_stacks(model)[:-1]:  # predictions are made of the outputs of the last one
            first, last = last + 1, last + len(stack.blocks)
            for index in range(last, first - 1, -1):
                if index not in ran or index not in wanted:
                    break
                if not torch.equal(_predictions(model, row, index)[0], expected):
                    break
                found[index] = names[index]
    return found


def _predictions(model: PreTrainedModel, row: Batch, changed: int | None) -> tuple[Tensor, list[int]]:
    """What the model predicts with the outputs of block `changed` replaced, and which blocks run, in running order."""
    ran = list[int]()

    def stub(index: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran.append(index)
            result = forward(*args, **kwargs)
            if index != changed:
                return result
            states = states_of(result)
            other = states.roll(1, -1) + states.float().std().to(states.dtype) * torch.linspace(
                -1, 1, states.shape[-1], dtype=states.dtype, device=states.device
            )
            return returned(extra_of(result), other)

        return run

    try:
        with stubbed(blocks_of(model), stub):
            output = model(**model_inputs(model, row), **call_options(model))
    except BillhookError:
        raise
    except (AttributeError, TypeError, ValueError) as error:  # inputs that do not fit, or a class that cannot be run
        who = f"transformers {transformers.__version__} cannot run {type(model).__name__} with these samples"
        raise BillhookError(f"{who}: {error}") from error
    return predictions(model, output), ran
