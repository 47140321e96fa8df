"""Models with zeros for the tests of packed directories."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def prune_at_random(model: Any, sparsity: float = 0.6, negative: bool = False) -> Any:
    """Set weights of the linear layers (and experts) to 0, or multiply them by 0, which makes half of them -0.0."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not any(word in name for word in ("emb", "wte", "wpe", "lm_head")):
                gone = torch.rand(weight.shape, generator=random) < sparsity
                weight.mul_(~gone) if negative else weight.masked_fill_(gone, 0)
    return model


def directory(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A directory with weights and a configuration only."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (
        (torch.randn(rows, columns, generator=random) * (torch.rand(rows, columns, generator=random) >= sparsity))
        .abs()
        .to(dtype)
    )
