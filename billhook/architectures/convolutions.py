"""Convolutions as matrices: views [out, in] of their weights, and their inputs as rows of windows.

A convolution multiplies its weight [out, channels, *kernel] with the window of its input at every position of its
output, so it is a linear layer with in = channels · kernel inputs and a row per position. With groups it is several:
the outputs of a group see the channels of that group only, and each group is a layer of its own. The rows are exact
for any stride, padding and dilation.

An image has thousands of positions where a text has hundreds of tokens, so of each image at most `POSITIONS` are
observed, drawn at random once, the same for all images: statistics are those of a sample of the rows.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

POSITIONS = 256  # of an image; about the tokens of one in a vision transformer

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # themselves: a subclass may compute something else


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is a convolution that has views [out, in]."""
    return type(module) in _KINDS and _weight(module).is_contiguous()


def group_count(module: nn.Module) -> int:
    """The number of groups of a convolution."""
    groups: int = module.groups  # type: ignore[assignment]
    return groups


def matrix(stored: Tensor, groups: int, group: int | None) -> Tensor:
    """The view [out / groups, in] of a `group`, or [out, in] if it is None, of a weight [out, channels, *kernel]."""
    return stored.view(len(stored), -1) if group is None else stored.view(groups, len(stored) // groups, -1)[group]


def geometry(module: nn.Module) -> tuple[Any, ...]:
    """What decides which windows a convolution sees, apart from its input."""
    return tuple(getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode"))


def windows(convolution: nn.Module, group: int | None, x: Tensor) -> Tensor:
    """The rows [images, positions, in] that a `group` of a convolution (None: the only one) multiplies.

    `x` [images, channels, *size] is the input of the module, of any dtype.
    """
    module: Any = convolution
    x = x if x.dim() == len(module.kernel_size) + 2 else x[None]
    channels = module.in_channels // module.groups
    start = channels * (group or 0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x[:, start : start + channels], module._reversed_padding_repeated_twice, mode=mode)
    for dim, size in enumerate(module.kernel_size, start=2):
        dilation = module.dilation[dim - 2]
        x = x.unfold(dim, (size - 1) * dilation + 1, module.stride[dim - 2])[..., ::dilation]
    places = x.shape[2 : 2 + len(module.kernel_size)]
    chosen: Any = torch.unravel_index(_positions(math.prod(places)).to(x.device), places)
    rows: Tensor = x[(slice(None), slice(None), *chosen)].transpose(1, 2).flatten(2)
    return rows


def _positions(count: int) -> Tensor:
    """Those of `count` positions that are observed, ascending, int64."""
    if count <= POSITIONS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:POSITIONS].sort().values


def why_not(module: nn.Module) -> str | None:
    """Why a convolution has no views [out, in], or None where it has or is none."""
    if not isinstance(module, _ConvNd) or is_convolution(module):
        return None
    if isinstance(module, _ConvTransposeNd):
        return "a transposed convolution, which is no product of its weight with windows of its input"
    if type(module) not in _KINDS:
        return f"a {type(module).__name__}, which may change its weight before it multiplies with it"
    return "not contiguous in memory: convert the model with model.to(memory_format=torch.contiguous_format)"


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight
