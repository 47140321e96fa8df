"""What a method returns for a weight: values that can be decoded and checked against the plan."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from billhook.errors import JobError
from billhook.methods.masks import Select


class Encoded(Protocol):
    """A weight as encoded by a method."""

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The values [out, in] in a dtype, as the next block sees them and a dense file stores them."""
        ...

    def check(self, stored: Tensor) -> list[str]:
        """Compare the decoded weight in the model, `stored` [out, in], with the plan, and return notes for the report.

        Raises JobError if it does not meet the plan.
        """
        ...


@dataclass(frozen=True, eq=False)
class Masked:
    """A weight with removed entries set to zero: `values` float32 [out, in], removed as `select` specifies.

    `zeros_before` is the number of zeros before pruning. Raises JobError for values that are not finite.
    """

    values: Tensor
    select: Select
    zeros_before: int

    def __post_init__(self) -> None:
        if not torch.isfinite(self.values.sum()) and not torch.isfinite(self.values).all():  # the sum is a fast test
            raise JobError("the new weights are not finite: use another criterion, or exclude the layer with --ignore.")

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The values in `dtype`."""
        return self.values.to(dtype)

    def check(self, stored: Tensor) -> list[str]:
        """More zeros than planned are possible where weights were zero before, or become zero in float16."""
        if self.select.keep_of is not None:
            keep, of = self.select.keep_of
            if bool((torch.count_nonzero(stored.reshape(-1, of), dim=1) > keep).any()):
                raise JobError(f"more than {keep} of {of} consecutive weights are left. The result is not saved.")
        elif self.select.rounding == "floor":
            return []  # the published counts differ from the plan's
        zeros, planned = count_zeros(stored), self.select.zeros
        if zeros < planned or count_zeros(self.values) > planned + self.zeros_before:
            raise JobError(f"{zeros} weights are zero where the plan asks for {planned}. The result is not saved.")
        if zeros == planned:
            return []
        return [f"{zeros - planned} more zeros than planned ({self.zeros_before} weights were zero before)"]


def count_zeros(weight: Tensor) -> int:
    """The number of entries that are exactly zero."""
    return weight.numel() - int(torch.count_nonzero(weight))
