"""Stacks of blocks: the lists of repeated modules of a model, such as the decoder layers of a Llama.

Two rules, in this order: (A) the innermost ModuleList or Sequential whose items are transformers'
`GradientCheckpointingLayer` or named in the model's `_no_split_modules`, or the layers of ResNet and RegNet, which are
lists of convolutions themselves; where the items are stages, each with a list of its own (Swin V2, PVT, Hiera), these
lists. (B) for models with code of their own, the outermost ModuleList of
`num_hidden_layers` modules of one class. A vision tower and a decoder are two stacks; lists whose names differ in a
number only are stages of one backbone. They run in the order of their definition, which is checked when they run
(`billhook.engine.flow`). A model without such a list is refused.

A module outside of these lists, such as a projector's linear layer or a patch embedding, can be made a stack of a
single block (`add_stacks`): so the walk sees its inputs and passes its outputs on as those of any other block.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from billhook.architectures.config import text_config
from billhook.errors import BillhookError

# Blocks that hold lists of convolutions, which transformers marks instead.
_OF_CONVOLUTIONS = frozenset({"ResNetBasicLayer", "ResNetBottleNeckLayer", "RegNetXLayer", "RegNetYLayer"})
_INSIDE_A_STAGE = ("blocks", "layers", "layer")  # names of the list of blocks of a stage
_ADDED = "_billhook_stacks"  # attribute of a model


@dataclass(frozen=True)
class Stack:
    """A list of blocks: its name in `model.named_modules()`, and the blocks by full name in running order."""

    name: str
    blocks: Mapping[str, nn.Module]


def find_stacks(model: PreTrainedModel) -> list[Stack]:
    """All stacks of a model in the order of its definition; an empty list where no rule applies."""
    found: Mapping[str, nn.ModuleList | nn.Sequential] = _marked_lists(model) or _equal_lists(model)
    stacks = [Stack(name, {f"{name}.{i}": block for i, block in enumerate(blocks)}) for name, blocks in found.items()]
    if added := added_stacks(model):
        stacks += [Stack(name, {name: model.get_submodule(name)}) for name in added]
        places = _places(model)
        stacks.sort(key=lambda stack: places[stack.name])
    return stacks


def _places(model: PreTrainedModel) -> dict[str, tuple[bool, int]]:
    """Where modules come in the order of the definition; what is outside of a decoder runs before it (Mllama)."""
    modules, decoder = list(model.named_modules()), model.get_decoder()
    inside = next((f".{name}." for name, module in modules if module is decoder), ".")
    return {name: (f".{name}.".startswith(inside), number) for number, (name, _) in enumerate(modules)}


def add_stacks(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Let modules outside of the blocks, by name, be stacks of one block each, instead of those added before."""
    setattr(model, _ADDED, tuple(names))


def added_stacks(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the modules that `add_stacks` added."""
    names: tuple[str, ...] = getattr(model, _ADDED, ())
    return names


def decoder_stack(model: PreTrainedModel) -> Stack:
    """The only stack of a model; raises BillhookError, naming all stacks, if there is none or more than one."""
    stacks = find_stacks(model)
    if len(stacks) != 1:
        who = f"{type(model).__name__} (model_type {model.config.model_type!r})"
        found = ", ".join(f"{stack.name} ({len(stack.blocks)} blocks)" for stack in stacks)
        several = f"{who} has several stacks of blocks: {found}. This works for models with one stack only."
        none = "no list of repeated modules that transformers marks as blocks, or as long as its configuration says"
        raise BillhookError(several if stacks else f"Cannot find the blocks of {who}: it has {none}.")
    return stacks[0]


def blocks_of(model: PreTrainedModel) -> Mapping[str, nn.Module]:
    """The blocks of all stacks by name, in running order.

    Raises BillhookError where there are none.
    """
    return {
        name: block for stack in find_stacks(model) or [decoder_stack(model)] for name, block in stack.blocks.items()
    }


def has_one_stack(model: PreTrainedModel) -> bool:
    """Whether all blocks are in one list, each passing its hidden states to the next."""
    return len(find_stacks(model)) == 1


def blocks_in(model: PreTrainedModel, wanted: Sequence[str]) -> dict[str, list[int]]:
    """The indices (into `blocks_of`) of the blocks of the wanted stacks, by the stack's name.

    `wanted` are names: `all`, `language` (the stacks of the text decoder), `vision` (those of the vision tower), or a
    stack or a module that contains stacks, such as `model.vision_tower` or `encoder`. Stages are one stack. Added
    stacks, which were asked for by name, are always among them. Raises BillhookError, naming all stacks, for a name
    that fits none.
    """
    found, at = dict[str, list[int]](), 0
    for stack in find_stacks(model):
        found.setdefault(_unnumbered(stack.name), []).extend(range(at, at + len(stack.blocks)))
        at += len(stack.blocks)
    chosen = {name for one in wanted for name in _named(model, list(found), one)}
    chosen |= set(map(_unnumbered, added_stacks(model)))
    return {name: indices for name, indices in found.items() if name in chosen}


def _unnumbered(name: str) -> str:
    """What the names of all stages of a stack have in common."""
    return re.sub(r"\d+", "*", name)


def _named(model: PreTrainedModel, names: Sequence[str], wanted: str) -> list[str]:
    """Those of the stacks that `wanted` names."""
    modules: dict[str, Callable[[], Any]] = {
        "language": model.get_decoder,
        "vision": partial(model.get_encoder, "image"),
    }
    inside = wanted
    if wanted in modules:
        module = modules[wanted]()
        inside = next((name for name, other in model.named_modules() if other is module), "")
        reads = "pixel_values" if wanted == "vision" else "input_ids"
        if module in (model, model.base_model):  # a model of one kind, which has no part of that name
            inside = "all" if model.main_input_name == reads else ""
    chosen = [name for name in names if inside == "all" or f".{inside}." in f".{name}."]
    if not chosen:
        raise BillhookError(
            f"--stacks {wanted} names none of the stacks of {type(model).__name__}: use all, language, vision, or "
            f"{' or '.join(names)}."
        )
    return chosen


def _marked_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Rule A: lists of modules that transformers itself treats as blocks and that contain no such list."""
    whole = {*_OF_CONVOLUTIONS, *(getattr(model, "_no_split_modules", None) or ())}
    inside = tuple(f"{name}." for name, module in model.named_modules() if type(module).__name__ in _OF_CONVOLUTIONS)

    def is_block(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in whole

    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and all(map(is_block, module))
        if not name.startswith(inside)
    }
    innermost = {name: m for name, m in found.items() if not any(other.startswith(f"{name}.") for other in found)}
    return {name: m for outer, stages in innermost.items() for name, m in _of_stages(outer, stages).items()}


def _of_stages(outer: str, stages: nn.ModuleList | nn.Sequential) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The lists of blocks inside the items of a list, or that list itself where its items are blocks."""
    if type(stages[0]).__name__ in _OF_CONVOLUTIONS:
        return {outer: stages}
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
