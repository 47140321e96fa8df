"""Run one block on hidden states with the arguments that its model once gave it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """The arguments of one block's call, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def part(self, windows: Tensor, one: "Call", dtype: torch.dtype) -> "Call":
        """The arguments for some `windows`, int64, of the batch; floating-point ones in `dtype`.

        `one` is the same call for a single window: where an argument is as large for it, it is the same for every
        window, and where not, it holds a stretch as long as there for each.
        """

        def part(value: Any, single: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(part(v, s) for v, s in zip(value, single, strict=True))
            if not isinstance(value, Tensor):
                return value
            for dim, length in enumerate(single.shape):
                if value.shape[dim] != length:
                    value = (
                        value.unflatten(dim, (-1, length))
                        .index_select(dim, windows.to(value.device))
                        .flatten(dim, dim + 1)
                    )
            return value.to(dtype) if value.is_floating_point() else value

        return Call(
            part(self.args, one.args), {key: part(value, one.kwargs[key]) for key, value in self.kwargs.items()}
        )


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that a block makes of `hidden`."""
    result = block(hidden, *call.args, **call.kwargs)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
