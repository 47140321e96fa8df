"""The metadata of a GGUF file that describes a model: its name and origin, and the sizes that llama.cpp reads.

Keys and values are those of llama.cpp's converter, in its words; `tests/export/test_converter.py` compares them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from billhook.architectures.gguf_names import Family
from billhook.errors import BillhookError

if TYPE_CHECKING:
    from gguf import GGUFWriter

# method of the writer, and the names under which configurations have the value
_SIZES = {
    "add_context_length": ("max_position_embeddings",),
    "add_embedding_length": ("hidden_size",),
    "add_feed_forward_length": ("intermediate_size",),
    "add_head_count": ("num_attention_heads",),
    "add_head_count_kv": ("num_key_value_heads",),
    "add_layer_norm_rms_eps": ("rms_norm_eps",),
}
_MORE = {
    "add_expert_count": ("num_local_experts", "num_experts"),
    "add_expert_used_count": ("num_experts_per_tok",),
    "add_key_length": ("head_dim",),
    "add_value_length": ("head_dim",),
}
_OF_ARCH = {
    "qwen2moe": {
        "add_expert_feed_forward_length": ("moe_intermediate_size",),
        "add_expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    },
    "qwen3moe": {"add_expert_feed_forward_length": ("moe_intermediate_size",)},
    "gemma2": {
        "add_key_length": ("head_dim",),
        "add_value_length": ("head_dim",),
        "add_attn_logit_softcapping": ("attn_logit_softcapping",),
        "add_final_logit_softcapping": ("final_logit_softcapping",),
        "add_sliding_window": ("sliding_window",),
    },
    "gemma3": {
        "add_final_logit_softcapping": ("final_logit_softcapping",),
        "add_sliding_window": ("sliding_window",),
    },
    "olmo": {"add_clamp_kqv": ("clip_qkv",)},
}


def add_origin(writer: "GGUFWriter", source: Path) -> None:
    """Name, authors, licence and sampling, from the model card, generation_config.json and the directory's name."""
    import gguf

    total, shared, expert, experts = writer.get_total_parameter_count()
    origin = gguf.Metadata.load(None, source, None, total)
    origin.name = origin.name or source.name
    origin.size_label = origin.size_label or gguf.size_label(total, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    origin.set_gguf_meta_model(writer)


def add_sizes(writer: "GGUFWriter", family: Family, config: Mapping[str, Any]) -> list[str]:
    """The sizes of the model in a complete configuration (defaults filled in); returns notes on what llama.cpp will
    compute otherwise.

    Raises BillhookError for a rotary embedding that has no form in GGUF.
    """
    limited = family.arch in ("gemma2", "phi3")  # the converter writes only what these read
    wanted = _SIZES | ({} if limited else _MORE) | _OF_ARCH.get(family.arch, {})
    writer.add_block_count(config["num_hidden_layers"])
    for method, keys in wanted.items():
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if value is not None:
            getattr(writer, method)(value)
    rope = config.get("rope_parameters") or {}
    if not limited:
        _add_rope(writer, rope, config)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if family.arch in ("llama", "smollm3"):
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head)
    if family.arch == "olmo":
        writer.add_layer_norm_eps(1e-5)
    if family.arch == "phi3":
        _add_phi3(writer, rope, config)
    return _add_windows(writer, family, config)


def _add_rope(writer: "GGUFWriter", rope: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    full = rope.get("full_attention", rope)
    kind = full.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(full["factor"])
    elif kind not in ("default", "llama3"):
        raise BillhookError(
            f"The rotary embedding {kind!r} of {config['model_type']} models has no form in GGUF files."
        )
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if full.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(full[key])
        if full.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(full["attention_factor"])
    if full.get("rope_theta") is not None:
        writer.add_rope_freq_base(full["rope_theta"])
    if (local := rope.get("sliding_attention", {}).get("rope_theta")) is not None:
        writer.add_rope_freq_base_swa(local)


def _add_phi3(writer: "GGUFWriter", rope: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if rope.get("long_factor"):
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)


def _rotated(config: Mapping[str, Any]) -> int:
    """The number of values of a head that are rotated."""
    part = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    return int(part * config["hidden_size"]) // int(config["num_attention_heads"])


def _add_windows(writer: "GGUFWriter", family: Family, config: Mapping[str, Any]) -> list[str]:
    """Which layers attend to a window, where that is not what llama.cpp assumes; a note where it has no windows."""
    window, kinds = config.get("sliding_window"), config.get("layer_types") or ()
    if family.period is None:
        ignored = f"llama.cpp attends to all tokens in {family.arch} models, where this one has a window of {window}."
        return [ignored] if window and window < config["max_position_embeddings"] else []
    local = [kind == "sliding_attention" for kind in kinds]
    for period in (family.period, *range(len(local) + 1)):  # 0: every layer has a window
        if local == [period == 0 or layer % period < period - 1 for layer in range(len(local))]:
            if period != family.period:
                writer.add_uint32(f"{family.arch}.attention.sliding_window_pattern", period)
            return []
    raise BillhookError("llama.cpp knows windows in all layers but every n-th, and this model has others.")


def rotary_factors(family: Family, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors with factors of the rotary frequencies, float32 [rotated / 2], by name in the file; most models have
    none."""
    rope = config.get("rope_parameters") or {}
    if family.arch == "phi3" and rope.get("long_factor"):
        names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {name: _checked(rope[key], _rotated(config) // 2) for name, key in names.items()}
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, config)}
    return {}


def _checked(factors: Sequence[float], length: int) -> np.ndarray:
    if len(factors) != length:
        raise BillhookError(f"config.json has {len(factors)} factors of rotary frequencies where {length} are needed.")
    return np.array(factors, np.float32)


def llama3_factors(rope: Mapping[str, Any], config: Mapping[str, Any]) -> np.ndarray:
    """By how much Llama 3.1 divides each rotary frequency: 1 for short wavelengths, `factor` for long ones, between
    them a mean of the two frequencies."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float32) / width)
    waves, original = 2 * math.pi / frequencies, rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors
