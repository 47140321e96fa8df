"""Random layers with statistics of their inputs, for tests of criteria."""

from dataclasses import replace

import torch

from billhook.methods.masks import Select
from billhook.methods.statistics import STATISTICS, Collector, LayerStats

Tensor = torch.Tensor


def layer(rows: int, columns: int, shared: float = 0.3) -> tuple[Tensor, LayerStats, Tensor]:
    """A random weight, the statistics of inputs of uneven scale with a `shared` part of few directions, and those
    inputs."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(3 * columns, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    own = torch.randn(3 * columns, columns, generator=generator)
    x = (shared * common / (columns / 4) ** 0.5 + (1 - shared) * own) * (0.1 + torch.rand(columns, generator=generator))
    collector = Collector(tuple(STATISTICS), columns)
    for part in x.split(16):
        collector.add(part)
    W, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    return W, replace(collector.stats(), gradient=gradient.abs() / 100), x


def selection(
    W: Tensor, sparsity: float, group: str = "row", rounding: str = "exact", keep_of: tuple[int, int] | None = None
) -> Select:
    return Select((W.shape[0], W.shape[1]), sparsity, round(sparsity * W.numel()), keep_of, group, rounding)  # type: ignore[arg-type]
