"""Run one block on hidden states with the arguments that its model once gave it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """The arguments of one block's call, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that a block makes of `hidden`."""
    result = block(hidden, *call.args, **call.kwargs)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
