"""Random weights with and without a heavy-tailed spectrum."""

import torch
from torch import Tensor


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian with rows and columns scaled by power laws: a heavy-tailed spectrum."""
    return (
        gaussian(rows, columns, seed)
        * torch.arange(1, rows + 1)[:, None] ** -0.7
        * torch.arange(1, columns + 1) ** -0.4
    )
