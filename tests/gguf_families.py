"""Tiny random models of every family that GGUF files are written for, with what is special to each."""

import shutil
from pathlib import Path
from typing import Any

import tiny
import torch
from paths import DEMO
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 4096  # of the demonstration model, whose tokenizer these have
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.5] * 8, "short_factor": [1.2] * 8}
# model_type, after a colon what is special, and the configuration
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama:llama3": {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 64}, "attention_bias": True},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "smollm3": {},
    "qwen2": {},
    "qwen2:yarn": {"rope_parameters": _YARN},
    "qwen3": {"head_dim": 32},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": _MOE | {"head_dim": 16, "norm_topk_prob": True},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"num_hidden_layers": 7},
    "phi3": {"sliding_window": None},
    "phi3:longrope": {
        "sliding_window": None,
        "rope_parameters": _LONG | {"original_max_position_embeddings": 256},
        "original_max_position_embeddings": 256,
    },
    "olmo": {},
    "olmo2": {},
}


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A random model in float32, whose norms and biases differ from their initial values too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition(":")[0], **(_COMMON | CONFIGS.get(name, {}) | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The directory of such a model, with a tokenizer."""
    tiny.save(folder, build(name, **changes), dtype=dtype, words=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / file, folder / file)
    return folder


def losses(model: PreTrainedModel) -> tuple[torch.Tensor, float]:
    """Two windows of 48 tokens, and their mean loss."""
    ids = torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, float(model(input_ids=ids, labels=ids).loss)
