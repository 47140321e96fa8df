"""Tiny random models of every supported family, built from their configs: four blocks, 32 wide, a vocabulary of 96."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96

# Names of the common sizes differ in the older families; what is special to a family (window, experts) is set to
# exercise it.
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "n_positions": 64}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 6}
CONFIGS: dict[str, dict] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": 8, "head_dim": 8},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "gemma": _COMMON | {"head_dim": 16},
    "gemma2": _COMMON | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": _COMMON
    | {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "phi": _COMMON | {"num_key_value_heads": 4},
    "phi3": _COMMON | {"pad_token_id": 0},
    "olmo2": _COMMON,
    "stablelm": _COMMON,
    "starcoder2": _COMMON,
    "cohere": _COMMON,
    "granite": _COMMON,
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "gpt_neox": _COMMON,
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "gpt2": _GPT2,
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2, "max_seq_len": 64},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "mixtral": _COMMON | _MOE,
    "qwen3_moe": _COMMON | {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "gpt_oss": _COMMON | _MOE | {"head_dim": 8, "sliding_window": 8},
    "llama4_text": _COMMON
    | _MOE
    | {"head_dim": 8, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "attention_chunk_size": 16}
    | {"num_experts_per_tok": 1, "pad_token_id": 0},
}

ARCHETYPES = ("llama", "gpt2", "mixtral", "gemma2", "falcon")  # what differs between families differs among these
FAMILIES = [pytest.param(name, marks=() if name in ARCHETYPES else pytest.mark.nightly) for name in CONFIGS]


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of `family` in float32, with weights large enough that experts and heads differ."""
    torch.manual_seed(seed)
    extra = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    if family in ("gpt2", "gptj", "bloom", "mpt"):
        del extra["max_position_embeddings"]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(extra | CONFIGS[family])), experts_implementation="eager"
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()
