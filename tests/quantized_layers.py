"""Random weights with inputs, and the tensors of directories, for tests of quantizers."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from billhook.methods.statistics import LayerStats
from billhook.store.shards import weight_files


def layer(seed: int = 0, out: int = 24, columns: int = 128, tokens: int = 512) -> tuple[Tensor, LayerStats, Tensor]:
    """A weight [out, in], its statistics, and its inputs [tokens, in], which are correlated and of unequal size."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(out, columns, generator=g) * 0.1
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    X = torch.randn(tokens, columns, generator=g) @ mix * torch.rand(columns, generator=g).mul(3).exp()
    gram = X.T @ X
    return W, LayerStats(tokens, 1, input_norm=gram.diagonal().sqrt(), gram=gram), X


def error(W: Tensor, V: Tensor, X: Tensor) -> float:
    """The relative squared error of the layer's output."""
    return float(((W - V) @ X.T).square().sum() / (W @ X.T).square().sum())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory by name."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found
