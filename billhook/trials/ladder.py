"""Masks of one layer at many sparsities, from scores sorted once.

A search masks the same scores again and again. A ladder keeps, of each comparison group, the scores at evenly spaced
ranks; masking at another sparsity is then one comparison with a stored threshold. What is lost is exactness: within a
rung of the ladder nothing can be told apart, ties go together, and the total is met by giving neighbouring rungs to
different rows. `Select` is exact.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ROW_RUNGS = 128  # a row of up to this many weights is kept whole; 4096 columns then cost 3 % of the layer's memory
LAYER_RUNGS = 8192
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Ladder:
    """`rungs` [groups, steps + 1] float32 ascending: column k is the score at or below which k / steps of the group
    lies."""

    rungs: Tensor

    @classmethod
    def of(cls, score: Tensor, group: Literal["row", "layer"]) -> "Ladder":
        """Sort the scores [out, in] of a layer within its comparison groups."""
        groups = score.reshape(1, -1) if group == "layer" else score
        columns = groups.shape[1]
        steps = min(columns, LAYER_RUNGS if group == "layer" else ROW_RUNGS)
        ranks = torch.arange(1, steps + 1, device=score.device) * columns // steps - 1
        if score.device.type == "cpu":
            ascending = torch.from_numpy(np.sort(groups.float().numpy(), axis=1))
        else:
            ascending = groups.float().sort(dim=1).values
        nothing = torch.full((len(groups), 1), -torch.inf, device=score.device)
        return cls(torch.cat([nothing, ascending[:, ranks]], dim=1))

    def at(self, sparsity: float) -> "Rung":
        """What selects the weights that stay when a fraction `sparsity` of the layer goes."""
        groups, steps = len(self.rungs), self.rungs.shape[1] - 1
        whole = round(sparsity * steps * groups)
        each, extra = divmod(whole, groups)
        # The rows that lose a step more are spread evenly, by multiples of the golden ratio, and are the same in every
        # trial.
        spread = (torch.arange(groups, dtype=torch.float64) * _GOLDEN % 1).argsort().argsort()
        step = each + (spread < extra).long().to(self.rungs.device)
        return Rung(self.rungs.gather(1, step[:, None]))


@dataclass(frozen=True)
class Rung:
    """One sparsity of a ladder; stands in for `Select` where a criterion wants to be told which scores stay."""

    threshold: Tensor

    def __call__(self, score: Tensor, start: int = 0) -> Tensor:
        """Return keep, bool [out, in], for the whole layer's scores [out, in]."""
        return score > self.threshold
