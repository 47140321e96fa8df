"""Run one block on hidden states with captured arguments."""

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
        """The arguments for some `windows` (indices, int64) of the batch, floating-point tensors in `dtype`.

        `one` is the same call for a single window. An argument of the same shape in both applies to every window; in
        others, the dimension that differs is the concatenation of all windows: the first one where a single window
        needs no such argument (a mask that hides nothing).
        """

        def part(value: Any, single: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(part(v, s) for v, s in zip(value, single, strict=True))
            if not isinstance(value, Tensor):
                return value
            for dim, length in enumerate((1,) if single is None else single.shape):
                if value.shape[dim] != length:
                    chosen = value.unflatten(dim, (-1, length)).index_select(dim, windows.to(value.device))
                    value = chosen.flatten(dim, dim + 1)
            return value.to(dtype) if value.is_floating_point() else value

        kwargs = {key: part(value, one.kwargs[key]) for key, value in self.kwargs.items()}
        return Call(part(self.args, one.args), kwargs)


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that a block returns for `hidden`."""
    return states_of(block(hidden, *call.args, **call.kwargs))


def states_of(result: Any) -> Tensor:
    """The hidden states in what a block returns, which may be a tuple that begins with them."""
    states: Tensor = result[0] if isinstance(result, tuple) else result
    return states
