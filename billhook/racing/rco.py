"""RCO: levels under an exact budget, by gradients of the model's true loss.

RCO, arXiv:2605.00649. Of N groups of tensors each gets one of its K levels, whose cost is c_ik. With logits z_ik:

    p = softmax(z) over k,   expected cost B(z) = Σ p_ik c_ik,   normal n_ik = ∂B/∂z_ik = p_ik (c_ik − Σ_j p_ij c_ij)

Each step draws the levels that maximize Σ_i z_ik + g_ik with Gumbel noise g under the budget (exactly, by dynamic
programming), puts these weights W_ik into the model, and takes the gradient of the KL divergence from the dense model
on a few calibration windows, straight through the choice:

    ∂L/∂p_ik = <∂L/∂W_i, W_ik>,   ∂L/∂z_ik = p_ik (∂L/∂p_ik − Σ_j p_ij ∂L/∂p_ij)

The gradient loses its component along n; Adam; then z + t c with t by bisection such that B is the budget again
(B rises with t), and Adam's first moment loses its component along the new n. The result is the most likely choice
within the budget; what is left of it is spent on the dearer levels that are most likely.

Levels are storage types, or anything else with a cost and a weight, such as sparsities. The weights of storage types
are those of GPTQ with the dense model's statistics, held as codes, one byte a weight and type.

Differences from the published code: a level that costs as much as another and has a larger measured error is left out;
embeddings and head get the types of `curves`.

Cost: one quantization at every type, then in each step a forward and a backward pass of `windows` windows and one
inner product for every type.

Measured: KL divergence .0504 after 100 steps, where `curves` has .0302 in a sixth of the time (a model of 5 blocks,
3.25 bits a weight).

Limits: the model, its gradients' layer by layer, and the codes must fit in memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.plan.knapsack import choose_levels
from billhook.racing.candidates import GradientLevels
from billhook.registry import method

BETAS, TINY = (0.9, 0.999), 1e-12


@method(paper="RCO 2026, arXiv:2605.00649", needs=("level_errors", "level_weights"))
def rco(
    weights: GradientLevels,
    costs: Sequence[Sequence[int]],
    budget: int,
    *,
    steps: int = 200,
    rate: float = 0.1,
    windows: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Return the level of each group of `weights`, whose summed `costs` are at most `budget`.

    `steps` of Adam with the learning rate `rate`, each on so many `windows`; `temperature` scales the Gumbel noise.
    Raises BillhookError for an option out of range and a budget below the cheapest levels.
    """
    descent = descend(
        weights, costs, budget, steps=steps, rate=rate, windows=windows, temperature=temperature, seed=seed
    )
    return descent.best()


def descend(
    weights: GradientLevels,
    costs: Sequence[Sequence[int]],
    budget: int,
    *,
    steps: int,
    rate: float,
    windows: int,
    temperature: float,
    seed: int,
) -> "Descent":
    """The logits after all steps of `rco`, whose options these are."""
    if steps < 1 or windows < 1 or not 0 < rate < 100 or not 0 <= temperature < 100:
        raise BillhookError(
            f"rco: steps={steps} and windows={windows} must be at least 1, rate={rate:g} and temperature="
            f"{temperature:g} positive and below 100."
        )
    draw = weights.windows(windows, seed)
    descent = Descent(costs, budget, rate, temperature, seed)
    for _ in range(steps):
        descent.update_(weights.gradients(descent.draw(), next(draw)))
    return descent


class Descent:
    """The logits z [N, K] with Adam's moments; K is the largest number of levels, and missing ones have p = 0."""

    def __init__(self, costs: Sequence[Sequence[int]], budget: int, rate: float, temperature: float, seed: int) -> None:
        self.costs, self.budget = [list(c) for c in costs], budget
        self.rate, self.temperature = rate, temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.c, self.z = self._padded(self.costs, 0.0), self._padded([[0.0] * len(c) for c in costs], -torch.inf)
        self.scale = float(self.c.max())
        self.c /= self.scale
        self.m, self.v, self.count = torch.zeros_like(self.c), torch.zeros_like(self.c), 0
        self.z = self._retracted(self.z)

    @property
    def p(self) -> Tensor:
        """The probabilities [N, K]."""
        return self.z.softmax(1)

    def draw(self) -> list[int]:
        """Levels within the budget, drawn with Gumbel noise."""
        noise = -torch.empty_like(self.c).exponential_(generator=self.generator).log()
        return self._feasible(self.z + self.temperature * noise)

    def update_(self, found: Sequence[Sequence[float]]) -> None:
        """One step, with ∂L/∂p of every group and level where drawn levels are in the model."""
        p, g = self.p, self._padded(found, 0.0)
        g = _tangent(p * (g - (p * g).sum(1, keepdim=True)), self._normal(self.z))
        self.count += 1
        self.m.lerp_(g, 1 - BETAS[0])
        self.v.lerp_(g.square(), 1 - BETAS[1])
        m, v = (x / (1 - beta**self.count) for x, beta in zip((self.m, self.v), BETAS, strict=True))
        self.z = self._retracted(self.z - self.rate * m / (v.sqrt() + TINY))
        self.m = _tangent(self.m, self._normal(self.z))

    def best(self) -> list[int]:
        """The most likely levels within the budget, and dearer ones, the most likely first, for what is left of it."""
        found = self._feasible(self.z)
        while True:
            left = self.budget - sum(c[k] for c, k in zip(self.costs, found, strict=True))
            steps = [
                (float(row[j] - row[k]), i, j)
                for i, (row, k) in enumerate(zip(self.z, found, strict=True))
                for j, cost in enumerate(self.costs[i])
                if 0 < cost - self.costs[i][k] <= left
            ]
            if not steps:
                return found
            _, i, j = max(steps)
            found[i] = j

    def expected(self, z: Tensor) -> float:
        """The expected cost of logits."""
        return float((z.softmax(1) * self.c).sum()) * self.scale

    def _feasible(self, logits: Tensor) -> list[int]:
        """The levels with the largest sum of logits within the budget."""
        losses = [(-row[: len(c)]).tolist() for row, c in zip(logits, self.costs, strict=True)]
        return choose_levels(self.costs, losses, self.budget)

    def _normal(self, z: Tensor) -> Tensor:
        p = z.softmax(1)
        return p * (self.c - (p * self.c).sum(1, keepdim=True))

    def _retracted(self, z: Tensor) -> Tensor:
        """z + t c with the expected cost of the budget, or as near as |t| < 1e4 comes."""
        low, high = -1e4, 1e4
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self.expected(z + middle * self.c) < self.budget else (low, middle)
        z = z + low * self.c
        return z - z.max(1, keepdim=True).values

    def _padded(self, rows: Sequence[Sequence[float]], fill: float) -> Tensor:
        width = max(map(len, self.costs))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.float64)


def _tangent(g: Tensor, normal: Tensor) -> Tensor:
    """`g` without its component along the normal."""
    return g - (g * normal).sum() / normal.square().sum().clamp_min(1e-300) * normal
