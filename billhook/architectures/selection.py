"""Which of a model's layers are meant: `--targets` and `--ignore`."""

import re
import shlex
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from billhook.architectures.convolutions import why_not
from billhook.architectures.layers import Layer, find_layers, layers_outside, left_out
from billhook.architectures.stacks import add_stacks, blocks_of
from billhook.errors import BillhookError
from billhook.registry import hint


def reach(model: PreTrainedModel, targets: Iterable[str]) -> None:
    """Make the modules outside of the blocks that `targets` mean, such as a projector, stacks of one block each.

    Only a target that matches nothing inside the blocks means them. Those of earlier targets are taken back.
    """
    add_stacks(model, ())
    if not (targets := list(targets)):
        return
    inside, outside = find_layers(model, convolutions=True), layers_outside(model)
    meant = [x for x in targets if not _matching(inside, x, "--targets")]
    names = {name for pattern in meant for name in _matching(outside, pattern, "--targets")}
    add_stacks(model, list(dict.fromkeys(x.stored_name.rpartition(".")[0] for x in outside if x.name in names)))


def select_layers(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    targets: Iterable[str] = (),
    ignore: Iterable[str] = (),
    *,
    also: Collection[str] = (),
) -> list[Layer]:
    """Those of a model's `layers` that match any of `targets` and none of `ignore`; without targets all but
    convolutions, of which those whose names are in `also` count as linear layers.

    A pattern is a class name (`Linear`), the name of a layer or of a module that contains layers (`model.layers.0`), or
    `re:` and a regular expression matched from the start of the name. A target that matches linear layers means no
    convolutions. Raises BillhookError for a pattern that matches nothing and for an empty result.
    """
    linear = [layer for layer in layers if not layer.is_convolution or layer.name in also]
    convolutions = [layer for layer in layers if layer not in linear]
    wanted, unwanted = set[str](), set[str]()
    for pattern in (targets := list(targets)):
        names = _matching(linear, pattern, "--targets") or _matching(convolutions, pattern, "--targets")
        wanted |= names or _no_match(model, layers, pattern, "--targets")
    for pattern in ignore:
        unwanted |= _matching(layers, pattern, "--ignore") or _no_match(model, layers, pattern, "--ignore")
    chosen = [x for x in (layers if targets else linear) if (not wanted or x.name in wanted) and x.name not in unwanted]
    if not chosen and not linear and not targets:
        raise BillhookError(
            f"{type(model).__name__} has no linear layer inside its blocks. Convolutions are pruned only where they "
            "are asked for: --targets Conv2d."
        )
    if not chosen:
        raise BillhookError("--targets and --ignore leave no layer to prune: loosen one of them.")
    return chosen


def _matching(layers: Sequence[Layer], pattern: str, option: str) -> set[str]:
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise BillhookError(f"{option} {shlex.quote(pattern)}: not a regular expression ({error}).") from None
        return {layer.name for layer in layers if expression.match(layer.name)}
    named = {x.name for x in layers if x.name == pattern or x.name.startswith(pattern + ".")}
    return named | {x.name for x in layers if type(x.module).__name__ == pattern}


def _no_match(model: PreTrainedModel, layers: Sequence[Layer], pattern: str, option: str) -> set[str]:
    """Raise BillhookError, saying why where the pattern names a linear layer or a convolution of the model."""
    inside, excluded = tuple(f"{name}." for name in blocks_of(model)), left_out(model)
    for name, module in model.named_modules():
        if pattern not in (name, type(module).__name__):
            continue
        if reason := why_not(module):
            raise BillhookError(f"{option} {pattern}: {name} cannot be pruned, it is {reason}.")
        if reason := excluded.get(name):
            raise BillhookError(f"{option} {pattern}: {name} is never pruned ({reason}).")
        if not name.startswith(inside) and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise BillhookError(f"{option} {pattern}: {name} is never pruned (head, small, shared, or special).")
        own = [parameter for parameter, value in module.named_parameters(recurse=False) if value.ndim > 1]
        if own and not name.startswith(inside):
            raise BillhookError(
                f"{option} {pattern}: {name} cannot be pruned, {own[0]} is a parameter outside of a linear layer."
            )
    close = hint(pattern, [x.name for x in layers] + [type(x.module).__name__ for x in layers])
    known = f"{close} List them with billhook prune MODEL --dry-run."
    raise BillhookError(f"{option} {shlex.quote(pattern)} matches no prunable layer.{known}")
