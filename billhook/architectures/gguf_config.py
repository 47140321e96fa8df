"""Configurations of models as metadata of GGUF files; `billhook.architectures.gguf_reading` goes back.

Keys and values are those of llama.cpp's converter. What it does not write, because llama.cpp computes a family with one
value only, is in `billhook.architectures.gguf_names`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from billhook.architectures.gguf_names import Family
from billhook.errors import BillhookError

# key after the name of the architecture, and the names under which configurations have the value
_SIZES = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
}
_HEADS = {"attention.key_length": ("head_dim",), "attention.value_length": ("head_dim",)}
_EXPERTS = {"expert_count": ("num_local_experts", "num_experts"), "expert_used_count": ("num_experts_per_tok",)}
_OF_QWEN_MOE = {
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
_GEMMA = {"final_logit_softcapping": ("final_logit_softcapping",), "attention.sliding_window": ("sliding_window",)}
_OF_ARCH = {
    "qwen2moe": _OF_QWEN_MOE,
    "qwen3moe": _OF_QWEN_MOE,
    "gemma2": _HEADS | _GEMMA | {"attn_logit_softcapping": ("attn_logit_softcapping",)},
    "gemma3": _GEMMA,
    "olmo": {"attention.clamp_kqv": ("clip_qkv",)},
}
_LIMITED = ("gemma2", "phi3")  # the converter writes no heads, experts and rotary scaling for these
PATTERN = "attention.sliding_window_pattern"


def size_names(arch: str) -> dict[str, tuple[str, ...]]:
    """Keys of the metadata of an architecture, and the names under which configurations have the values."""
    return _SIZES | ({} if arch in _LIMITED else _HEADS | _EXPERTS) | _OF_ARCH.get(arch, {})


def gguf_sizes(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that describes a model, given its configuration with defaults filled in.

    Raises BillhookError for a rotary embedding or windows that have no form in GGUF.
    """
    arch, found = family.arch, dict[str, Any]()
    for key, names in size_names(arch).items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            found[key] = float(value) if key.endswith(("epsilon", "softcapping", "clamp_kqv")) else value
    rope = config.get("rope_parameters") or {}
    found |= _rope(rope, config) if arch not in _LIMITED else {}
    if arch in ("llama", "smollm3"):
        found |= {"vocab_size": config["vocab_size"], "rope.dimension_count": head_size(config)}
    if arch == "olmo":
        found["attention.layer_norm_epsilon"] = 1e-5
    if arch == "phi3":
        found |= _phi3(rope, config)
    if family.period is not None and (period := _period(family, config)) != family.period:
        found[PATTERN] = period
    return {f"{arch}.{key}": value for key, value in found.items()}


def head_size(config: Mapping[str, Any]) -> int:
    """The width of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    full, found = rope.get("full_attention", rope), dict[str, Any]()
    kind = full.get("rope_type", "default")
    if kind not in ("default", "llama3", "linear", "yarn"):
        raise BillhookError(
            f"The rotary embedding {kind!r} of {config['model_type']} models has no form in GGUF files."
        )
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        found |= {f"rope.scaling.{key}": float(full[name]) for name, key in names.items() if full.get(name) is not None}
    bases = {"rope.freq_base": full, "rope.freq_base_swa": rope.get("sliding_attention", {})}
    return found | {key: float(x["rope_theta"]) for key, x in bases.items() if x.get("rope_theta") is not None}


def _phi3(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    found = {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": _rotated(config),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if rope.get("long_factor"):
        scale = config["max_position_embeddings"] / original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return found


def _rotated(config: Mapping[str, Any]) -> int:
    """The number of values of a head that are rotated."""
    part = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    return int(part * config["hidden_size"]) // int(config["num_attention_heads"])


def _period(family: Family, config: Mapping[str, Any]) -> int:
    """Every how many layers one attends to everything (0: none does); the family's, if that fits."""
    local = [kind == "sliding_attention" for kind in config.get("layer_types") or ()]
    assert family.period is not None
    for period in (family.period, *range(len(local) + 1)):
        if local == [kind == "sliding_attention" for kind in layer_types(period, len(local))]:
            return period
    raise BillhookError("llama.cpp knows windows in all layers but every n-th, and this model has others.")


def layer_types(period: int, layers: int) -> list[str]:
    """The kinds of attention of a model where every `period`-th layer attends to everything (0: none does)."""
    local = (period == 0 or layer % period < period - 1 for layer in range(layers))
    return ["sliding_attention" if own else "full_attention" for own in local]


def window_note(family: Family, config: Mapping[str, Any]) -> list[str]:
    """A note where a model attends to a window and llama.cpp to all tokens."""
    window = config.get("sliding_window")
    if family.period is not None or not window or window >= config["max_position_embeddings"]:
        return []
    return [f"llama.cpp attends to all tokens in {family.arch} models, where this one has a window of {window}."]


def rotary_factors(family: Family, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors with factors of the rotary frequencies, float32 [rotated / 2], by name in the file; most models have
    none."""
    rope = config.get("rope_parameters") or {}
    if family.arch == "phi3" and rope.get("long_factor"):
        names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        factors = {name: torch.tensor(rope[key], dtype=torch.float32) for name, key in names.items()}
        if any(len(values) != _rotated(config) // 2 for values in factors.values()):
            raise BillhookError(f"config.json needs {_rotated(config) // 2} factors of rotary frequencies.")
        return factors
    return {"rope_freqs.weight": llama3_factors(rope, head_size(config))} if rope.get("rope_type") == "llama3" else {}


def llama3_factors(rope: Mapping[str, Any], width: int) -> torch.Tensor:
    """By how much Llama 3.1 divides each rotary frequency, float32 [width / 2]: 1 for short wavelengths, `factor` for
    long ones, between them what their mean comes to."""
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
