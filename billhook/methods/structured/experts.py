"""Which experts of a mixture stay.

* `reap`: those with the largest effect on what the mixture returns (Lasby et al., "REAP the Experts: Why Pruning
  Prevails for One-Shot MoE compression", arXiv:2510.13999):
  score_e = mean over the tokens sent to e of g_e(x) · ||f_e(x)||_2.
* `frequency`: those that receive the most tokens.

Experts that received no token go first. A tie goes to the earlier expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.methods.structured.support import largest
from billhook.registry import Registry, method


@dataclass(frozen=True)
class ExpertStats:
    """Of each expert, [experts]: the `tokens` that it received, and the sum over them of router weight times output
    norm, `effect`."""

    tokens: Tensor
    effect: Tensor


@method(paper="Lasby et al. 2025, arXiv:2510.13999")
def reap(stats: ExpertStats, count: int) -> Tensor:
    """The `count` experts with the largest mean effect on their tokens, bool [experts]."""
    return largest(torch.where(stats.tokens > 0, stats.effect / stats.tokens.clamp_min(1), -1), count)


@method(paper="Muzio et al. 2024, arXiv:2404.05089")
def frequency(stats: ExpertStats, count: int) -> Tensor:
    """The `count` experts with the most tokens, bool [experts]."""
    return largest(stats.tokens, count)


EXPERTS = Registry("expert method", {"reap": f"{__name__}:reap", "frequency": f"{__name__}:frequency"})
