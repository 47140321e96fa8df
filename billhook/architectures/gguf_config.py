"""Configurations of models as metadata of GGUF files; `billhook.architectures.gguf_reading` goes back.

Keys and values are those of llama.cpp's converter. What it does not write, because llama.cpp computes a family with one
value only, is in `billhook.architectures.gguf_names`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from billhook.architectures.gguf_names import Family, gguf_family, head_size
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
_LIMITED = ("gemma2", "phi3")  # the converter writes no heads, experts and rotary embedding for these
_USUAL = {"rope.freq_base": 10000.0}  # the rotary embedding of which nothing need be written
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
    rotary = _rope(family, rope, config) if arch != "phi3" else {}
    found |= rotary if arch not in _LIMITED or rotary != _USUAL else {}
    if arch in ("llama", "smollm3"):
        found |= {"vocab_size": config["vocab_size"], "rope.dimension_count": head_size(config)}
    if arch == "olmo":
        found["attention.layer_norm_epsilon"] = 1e-5
    if arch == "phi3":
        found |= _phi3(rope, config)
    if family.period is not None and (period := _period(family, config)) != family.period:
        found[PATTERN] = period
    return {f"{arch}.{key}": value for key, value in found.items()}


def _rope(family: Family, rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    full, local, found = rope.get("full_attention", rope), rope.get("sliding_attention", {}), dict[str, Any]()
    kind, local_kind = full.get("rope_type", "default"), local.get("rope_type", "default")
    known = ("default", "linear", "yarn", *(["llama3"] if family.arch == "llama" else []))
    for name, possible in ((kind, known), (local_kind, ("default",))):
        if name not in possible:
            raise BillhookError(
                f"The rotary embedding {name!r} of {config['model_type']} models has no form in GGUF files."
            )
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind == "yarn":
        found |= _yarn(family, full)
    bases = {"rope.freq_base": full, "rope.freq_base_swa": local}
    return found | {key: float(x["rope_theta"]) for key, x in bases.items() if x.get("rope_theta") is not None}


def _yarn(family: Family, rope: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's scaling as the converter writes it, and its factor of attention, of which llama.cpp reads only how it
    differs from the usual one, for all layers."""
    found: dict[str, Any] = {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
    found |= {f"rope.scaling.{key}": float(rope[name]) for name, key in names.items() if rope.get(name) is not None}
    if not math.isclose(factor := yarn_attention(rope) / yarn_attention({"factor": rope["factor"]}), 1.0, rel_tol=1e-6):
        found["rope.scaling.attn_factor"] = factor
    if not rope.get("truncate", True) or (family.period is not None and "rope.scaling.attn_factor" in found):
        raise BillhookError(
            f"llama.cpp computes {family.arch} models with YaRN only with the usual truncate and attention_factor."
        )
    return found


def yarn_attention(rope: Mapping[str, Any]) -> float:
    """By what YaRN multiplies queries and keys: `attention_factor`, or what follows from `factor` and `mscale`."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    grown = 0.1 * math.log(max(1.0, rope["factor"]))
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return (grown * above + 1) / (grown * below + 1) if above and below else grown + 1


def _phi3(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    found = {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": _rotated(config),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if rope.get("long_factor"):
        found["rope.scaling.attn_factor"] = longrope_attention(
            rope, config["max_position_embeddings"] / original, original
        )
    return found


def longrope_attention(rope: Mapping[str, Any], longer: float, original: int) -> float:
    """By what LongRoPE multiplies queries and keys, in a model whose context of `original` tokens became `longer` times
    as long."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scale = rope.get("factor") or longer
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def _rotated(config: Mapping[str, Any]) -> int:
    """The number of values of a head that are rotated."""
    part = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    return int(part * config["hidden_size"]) // int(config["num_attention_heads"])


def _period(family: Family, config: Mapping[str, Any]) -> int:
    """Every how many layers one attends to everything (0: none does); the family's, if that fits."""
    local = [kind == "sliding_attention" for kind in config.get("layer_types") or ()]
    assert family.period is not None
    for period in (family.period, 0, *range(2, len(local) + 1)):
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


def new_shape_note(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A note where a configuration has a form in GGUF files and what became of it has none."""
    try:
        gguf_sizes(gguf_family(before), before)
    except BillhookError:
        return []
    try:
        gguf_sizes(gguf_family(after), after)
    except BillhookError as reason:
        return [f"transformers and vLLM open this shape, llama.cpp does not. {reason}"]
    return []


def yarn_note(config: Mapping[str, Any]) -> list[str]:
    """A note where YaRN has slopes, which llama.cpp takes from its command line and not from the file."""
    rope = config.get("rope_parameters") or {}
    rope, usual = rope.get("full_attention", rope), {"beta_fast": 32, "beta_slow": 1}
    other = {key: rope[key] for key, value in usual.items() if (rope.get(key) or value) != value}
    if rope.get("rope_type") != "yarn" or not other:
        return []
    flags = " ".join(f"--yarn-{key.replace('_', '-')} {value:g}" for key, value in other.items())
    return [f"llama.cpp does not read YaRN's slopes from the file. Start it with {flags}."]


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
