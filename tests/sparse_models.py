"""Models with zeros, made without a criterion."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from billhook import Plan, find_layers
from billhook.plan.spec import Pattern
from billhook.store.record import Step, append_step

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


def prune_with_record(model, sparsity: float = 0.5, pattern: str = "unstructured") -> dict:
    """Zero weights of every layer, and return what billhook.json would say."""
    layers = find_layers(model)
    plan = Plan.of_sparsities(
        sparsity, Pattern.parse(pattern), dict.fromkeys((layer.name for layer in layers), sparsity)
    )
    facts = {}
    for layer, zeros in zip(layers, plan.zeros({layer.name: layer.shape for layer in layers}).values(), strict=True):
        weight = layer.weight
        order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(len(facts)))
        if plan.pattern.of:
            order = order.view(weight.shape).view(weight.shape[0], -1, plan.pattern.of).argsort(-1).view(weight.shape)
            weight[order >= plan.pattern.kept(sparsity)] = 0
        else:
            weight[(order < zeros).view(weight.shape)] = 0
        parameter = f"{layer.name}.weight" if layer.expert is None else layer.name.rpartition(".")[0]
        facts[layer.name] = {"shape": list(layer.shape), "sparsity": sparsity, "zeros": int((weight == 0).sum())}
        facts[layer.name] |= {"tensor": parameter, "index": layer.expert, "transposed": layer.transposed}
    return append_step(None, Step("prune", plan.to_json(), {}, {}), facts).to_json()


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
