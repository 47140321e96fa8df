"""Stacks of blocks: the lists of repeated modules of a model, such as the decoder layers of a Llama.

Two rules, in this order: (A) the innermost ModuleList or Sequential whose items are transformers'
`GradientCheckpointingLayer` or named in the model's `_no_split_modules`; where the items are stages, each with a list
of its own (Swin V2, PVT, Hiera), these lists. (B) for models with code of their own, the outermost ModuleList of
`num_hidden_layers` modules of one class. Stages of one backbone, whose names differ in a number only, are visited one
after the other. A model without such a list is refused.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from billhook.architectures.config import text_config
from billhook.errors import BillhookError

_INSIDE_A_STAGE = ("blocks", "layers", "layer")  # names of the list of blocks of a stage


@dataclass(frozen=True)
class Stack:
    """A list of blocks: its name in `model.named_modules()`, and the blocks by full name in running order."""

    name: str
    blocks: Mapping[str, nn.Module]


def find_stacks(model: PreTrainedModel) -> list[Stack]:
    """All stacks of a model in the order of its definition; an empty list where no rule applies."""
    found: Mapping[str, nn.ModuleList | nn.Sequential] = _marked_lists(model) or _equal_lists(model)
    return [Stack(name, {f"{name}.{i}": block for i, block in enumerate(blocks)}) for name, blocks in found.items()]


def decoder_stack(model: PreTrainedModel) -> Stack:
    """The only stack, or among several the one with the depth of the text decoder.

    Raises BillhookError, naming all stacks, if there is no such stack or more than one.
    """
    stacks = find_stacks(model)
    depth = getattr(text_config(model.config), "num_hidden_layers", None)
    chosen = stacks if len(stacks) == 1 else [stack for stack in stacks if len(stack.blocks) == depth]
    if len(chosen) != 1:
        found = ", ".join(f"{stack.name} ({len(stack.blocks)})" for stack in stacks) or "none"
        raise BillhookError(
            f"Cannot find the blocks of {type(model).__name__} (model_type {model.config.model_type!r}): expected one "
            f"list of {depth} blocks, found {found}. Only models with one stack of blocks can be pruned."
        )
    return chosen[0]


def blocks_of(model: PreTrainedModel) -> Mapping[str, nn.Module]:
    """The blocks that are pruned, by name, in running order: those of all stages of a backbone, or of the only stack.

    Raises BillhookError as `decoder_stack` does.
    """
    stacks = find_stacks(model)
    if _are_stages(stacks):
        return {name: block for stack in stacks for name, block in stack.blocks.items()}
    return decoder_stack(model).blocks


def is_staged(model: PreTrainedModel) -> bool:
    """Whether the model has several stages, between which its hidden states change their width."""
    return _are_stages(find_stacks(model))


def _are_stages(stacks: list[Stack]) -> bool:
    return len(stacks) > 1 and len({re.sub(r"\d+", "", stack.name) for stack in stacks}) == 1


def _marked_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Rule A: lists of modules that transformers itself treats as blocks and that contain no such list."""
    whole = set(getattr(model, "_no_split_modules", None) or ())

    def is_block(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in whole

    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and all(map(is_block, module))
    }
    innermost = {name: m for name, m in found.items() if not any(other.startswith(f"{name}.") for other in found)}
    return {name: m for outer, stages in innermost.items() for name, m in _of_stages(outer, stages).items()}


def _of_stages(outer: str, stages: nn.ModuleList | nn.Sequential) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The lists of blocks inside the items of a list, or that list itself where its items are blocks."""
    found = {
        f"{outer}.{number}.{name}": inner
        for number, stage in enumerate(stages)
        for name, inner in stage.named_children()
        if name in _INSIDE_A_STAGE and isinstance(inner, nn.ModuleList | nn.Sequential) and len(inner)
    }
    return found if len(found) == len(stages) else {outer: stages}


def _equal_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Rule B: outermost lists of `num_hidden_layers` modules of one class."""
    depth = getattr(text_config(model.config), "num_hidden_layers", 0)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(m) for m in module}) == 1
    }
    return {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}


@contextmanager
def first_blocks(model: PreTrainedModel, depth: int) -> Iterator[None]:
    """Keep only the first `depth` blocks; afterwards restore the others, and the parameters of the first ones.

    A copy of these parameters is in memory, except for a streamed model, whose changes do not last anyway.
    """
    blocks, config = model.get_submodule(decoder_stack(model).name), text_config(model.config)
    assert isinstance(blocks, nn.ModuleList)
    count, others = len(blocks), list(blocks)[depth:]
    before = [(p, p.detach().clone()) for p in blocks[:depth].parameters() if not p.is_meta]
    del blocks[depth:]
    config.num_hidden_layers = len(blocks)
    try:
        yield
    finally:
        blocks.extend(others)
        config.num_hidden_layers = count
        for p, value in before:
            p.data.copy_(value)
