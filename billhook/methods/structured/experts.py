"""Which experts of a mixture stay, and how those that stay make up for the others.

* `obs`: experts are removed one after another (in at most `ROUNDS` rounds), each time the one without which the
  mixture's outputs change least, the tokens of removed experts going where the router then sends them. The down
  projections of the experts that stay then solve the least-squares problem of the mixture's outputs, expert by expert
  in `SWEEPS` sweeps: OSSCAR's idea (arXiv:2403.18983) with experts in the place of channels.
* `merge`: MoNE's choice (Zhang et al., "MoNE: Replacing Redundant Experts with Lightweight Novices for Structured
  Pruning of MoE", arXiv:2507.00390): score_e = tokens sent to e · variance of f_e over them. There a removed expert is
  replaced by its mean output. Ordinary mixtures have no place for a constant, so the experts that receive its tokens
  give the mean instead, by a change of rank one of their down projections.
* `reap`: those with the largest effect on what the mixture returns (Lasby et al., "REAP the Experts: Why Pruning
  Prevails for One-Shot MoE compression", arXiv:2510.13999):
  score_e = mean over the tokens sent to e of g_e(x) · ||f_e(x)||_2. Weights keep their values.
* `frequency`: those that receive the most tokens. Weights keep their values.

Experts that received no token go first. A tie goes to the earlier expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from billhook.methods.structured.support import damped, largest
from billhook.registry import Registry, method

Fit = Literal["", "mean", "least squares"]  # what the experts that stay make up for
ROUNDS = 16
SWEEPS = 2
DAMPING = 0.01  # a fraction of the mean of the gram's diagonal


@dataclass(frozen=True)
class ExpertStats:
    """What the experts of a mixture do on the calibration tokens.

    Of each expert, [experts]: the `tokens` that it received; the sums over them of router weight times output norm,
    `effect`, and of squared distances of outputs from their mean, `spread`. `losses(keep)`, for keep bool [experts],
    is the squared change of the mixture's outputs without each expert, beside those that are gone already; infinite
    for these.
    """

    tokens: Tensor
    effect: Tensor
    spread: Tensor
    losses: Callable[[Tensor], Tensor]


@method(paper="Meng et al. 2024, arXiv:2403.18983, on the experts' outputs")
def obs(stats: ExpertStats, count: int) -> Tensor:
    """The `count` experts without the others of which the mixture's outputs change least, bool [experts]."""
    keep = torch.ones(len(stats.tokens), dtype=torch.bool)
    surplus = len(keep) - count
    step = max(1, -(-surplus // ROUNDS))
    while surplus > 0:
        keep[stats.losses(keep).argsort(stable=True)[: min(step, surplus)]] = False
        surplus -= step
    return keep


@method(paper="Zhang et al. 2025, arXiv:2507.00390")
def merge(stats: ExpertStats, count: int) -> Tensor:
    """The `count` experts with the largest product of tokens and variance of the output, bool [experts]."""
    return largest(torch.where(stats.tokens > 0, stats.spread, -1), count)


@method(paper="Lasby et al. 2025, arXiv:2510.13999")
def reap(stats: ExpertStats, count: int) -> Tensor:
    """The `count` experts with the largest mean effect on their tokens, bool [experts]."""
    return largest(torch.where(stats.tokens > 0, stats.effect / stats.tokens.clamp_min(1), -1), count)


@method(paper="Muzio et al. 2024, arXiv:2404.05089")
def frequency(stats: ExpertStats, count: int) -> Tensor:
    """The `count` experts with the most tokens, bool [experts]."""
    return largest(stats.tokens, count)


EXPERTS = Registry("expert method", {name: f"{__name__}:{name}" for name in ("obs", "merge", "reap", "frequency")})
FITS: dict[str, Fit] = {"obs": "least squares", "merge": "mean"}


def fitted(fit: Fit, inputs: Tensor, weights: Tensor, missing: Tensor) -> Tensor:
    """The change of an expert's down projection, float32 [width, inputs], with which it gives what is `missing`.

    Of the tokens that it receives: `inputs` of the down projection [tokens, inputs], router `weights` [tokens], and
    what the mixture's outputs lack, [tokens, width].
    """
    X = inputs.float() * weights.float()[:, None]
    if fit == "mean":
        mean = inputs.float().mean(0)
        part = X @ mean  # of each token, along the mean
        change = (part @ missing.float()) / part.square().sum().clamp_min(1e-30)
        return torch.outer(change, mean)
    H = damped(X.T @ X, DAMPING)
    solved: Tensor = torch.linalg.solve(H, (X.T @ missing.float()).to(H.dtype))
    return solved.T.float()
