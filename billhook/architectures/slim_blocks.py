"""Whether blocks of a model can be dropped: whether a configuration can say so.

One block is taken away on trial, and the model that the new configuration gives, without weights, has to have the
shapes of what is left.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.architectures.slim_config import slimmed
from billhook.architectures.stacks import blocks_of, decoder_stack, find_stacks
from billhook.errors import BillhookError
from billhook.store.files import in_one_line


def check_blocks(model: PreTrainedModel) -> None:
    """Raise BillhookError, naming the model's type, where no configuration says that blocks are missing.

    That is the case for several stacks, for blocks of several kinds whose order the configuration does not give, and
    for weights outside of the blocks that are as large as there are blocks.
    """
    stacks = find_stacks(model) or [decoder_stack(model)]
    who = f"{model.config.model_type} models cannot have fewer blocks"
    if len(stacks) != 1:
        names = f"such as {stacks[0].name} and {stacks[-1].name}"
        raise BillhookError(f"{who}: they have several stacks, {names}. Name other kinds of units.")
    blocks = stacks[0].blocks
    if len(blocks) == 1:
        raise BillhookError("The model has one block, which must stay. Name other kinds of units.")
    left = [0, *range(2, len(blocks))]  # without the second, because some models have a first block of another kind
    config, _, _ = slimmed(model, [], {}, left, len(blocks))
    try:
        with torch.device("meta"):
            made = type(model)(config)
            new = blocks_of(made)
    except Exception as error:  # whatever the model's class raises
        raise BillhookError(f"{who}: {in_one_line(error)}.") from None
    if len(new) != len(left):
        raise BillhookError(f"{who}: their configuration has no place for it.")
    shapes = list(map(_shapes, blocks.values()))
    if [shapes[i] for i in left] != list(map(_shapes, new.values())):
        raise BillhookError(f"{who}: their blocks are not alike, and their configuration has no list of their kinds.")
    if (name := reshaped(model, made)) is not None:
        raise BillhookError(f"{who}: {name}, which is outside of them, would change too. Name other kinds of units.")


def reshaped(model: PreTrainedModel, made: PreTrainedModel) -> str | None:
    """The first weight outside of the blocks of a model that has another shape in the one that was `made`."""
    inside, shapes = tuple(f"{name}." for name in blocks_of(model)), _shapes(made)
    outside = {name: shape for name, shape in _shapes(model).items() if not name.startswith(inside)}
    return next((name for name, shape in outside.items() if shapes.get(name, shape) != shape), None)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}
