"""What a tensor on disk is called in a GGUF file, and how its rows lie there, as llama.cpp's converter writes them.

The names come from the tables of the `gguf` package. What this module adds is what those tables do not hold: the
families that were compared with the converter, tensor by tensor, the order of rows, and the values of config.json that
llama.cpp computes with whatever the model says.

Reference: llama.cpp, `conversion/` (release of September 2026).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from billhook.errors import BillhookError
from billhook.store.fitting import is_unused

HEAD = "lm_head.weight"
_EXPERT = re.compile(r"(.*\.)(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)(?:\.weight)?")
_SILU = {"hidden_act": "silu"}


@dataclass(frozen=True)
class Family:
    """A family of models.

    `arch` is its name in GGUF files. `permuted`: the rows of q and k are reordered, because llama.cpp rotates
    neighbouring pairs of values and transformers the two halves of a head. `shift` is added to the weights of norms.
    `assumed` are values of config.json which llama.cpp does not read from the file, or functions that compute them from
    the configuration as llama.cpp does. `square`: its heads together must be as wide as the model. `period`: every
    `period`-th layer attends to everything, the others to a window, unless the file says otherwise; None where it has
    no windows.
    """

    arch: str
    permuted: bool = False
    shift: float = 0.0
    assumed: Mapping[str, Any] = field(default_factory=dict)
    square: bool = False
    period: int | None = None

    def computed(self, key: str, config: Mapping[str, Any]) -> Any:
        """The value of `assumed` with which llama.cpp computes a model of this configuration."""
        value = self.assumed[key]
        return value(config) if callable(value) else value


def head_size(config: Mapping[str, Any]) -> int:
    """The width of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _scores_by(largest: int) -> Callable[[Mapping[str, Any]], int]:
    """By the root of which number Gemma's scores are divided: another one in the model of `largest` blocks (27B)."""

    def scale(config: Mapping[str, Any]) -> int:
        of_model = int(config["hidden_size"]) // int(config["num_attention_heads"])
        return of_model if config["num_hidden_layers"] == largest else head_size(config)

    return scale


def _or(key: str, value: float) -> Callable[[Mapping[str, Any]], float]:
    """The value of the configuration, which llama.cpp reads, or else its own."""
    return lambda config: float(config.get(key) or value)


def _rotated_layers(config: Mapping[str, Any]) -> list[int]:
    return [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]


_PLAIN = {"attention_bias": False}
_QWEN = _SILU | {"use_sliding_window": False}
_QWEN_MOE = _QWEN | {"decoder_sparse_step": 1, "mlp_only_layers": []}
_GEMMA = _PLAIN | {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_GEMMA2 = _GEMMA | {
    "query_pre_attn_scalar": _scores_by(46),
    "attn_logit_softcapping": _or("attn_logit_softcapping", 50.0),
    "final_logit_softcapping": _or("final_logit_softcapping", 30.0),
}
_GEMMA3 = _GEMMA | {"query_pre_attn_scalar": _scores_by(62), "use_bidirectional_attention": False}
_SMOLLM3 = _QWEN | _PLAIN | {"mlp_bias": False, "no_rope_layers": _rotated_layers}
_QWEN2_MOE = _QWEN_MOE | {"norm_topk_prob": False, "tie_word_embeddings": False}
FAMILIES = {
    "llama": Family("llama", permuted=True, assumed=_SILU),
    "mistral": Family("llama", permuted=True, assumed=_SILU),
    "mixtral": Family("llama", permuted=True, assumed=_SILU),
    "smollm3": Family("smollm3", permuted=True, assumed=_SMOLLM3),
    "qwen2": Family("qwen2", assumed=_QWEN, square=True),
    "qwen3": Family("qwen3", assumed=_QWEN | _PLAIN),
    "qwen2_moe": Family("qwen2moe", assumed=_QWEN2_MOE, square=True),
    "qwen3_moe": Family("qwen3moe", assumed=_QWEN_MOE | _PLAIN | {"norm_topk_prob": True}),
    "gemma2": Family("gemma2", shift=1.0, assumed=_GEMMA2, period=2),
    "gemma3_text": Family("gemma3", shift=1.0, assumed=_GEMMA3, period=6),
    "phi3": Family("phi3", assumed=_SILU, square=True),
    "olmo": Family("olmo", permuted=True, assumed=_SILU | _PLAIN, square=True),
    "olmo2": Family("olmo2", assumed=_SILU | _PLAIN | {"tie_word_embeddings": False}, square=True),
}


def gguf_family(config: Mapping[str, Any]) -> Family:
    """The family of a configuration; raises BillhookError for one that is unknown, or that llama.cpp would compute
    otherwise."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BillhookError(
            f"No GGUF names are known for {kind} (known: {known}). If llama.cpp runs such models, convert it with its "
            "convert_hf_to_gguf.py, and give that file with --template. Directories for transformers (compress --for "
            "transformers, quantize --type int4) need no such names."
        )
    family = FAMILIES[kind]
    for key in (key for key in family.assumed if key in config):
        if config[key] != (value := family.computed(key, config)):
            raise BillhookError(f"llama.cpp computes {kind} models with {key}={value}, and this one has {config[key]}.")
    if family.square and head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise BillhookError(
            f"llama.cpp opens {kind} models only if their heads together are {config['hidden_size']} wide, as the "
            f"model is, and this one has {config['num_attention_heads']} of {head_size(config)}."
        )
    return family


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file and where its values come from.

    `sources` are tensors on disk, which are stacked if there are several (experts); of each, the `rows` are taken, in
    this order (None: all, as they are). `shape` is [..., out, in], `shift` is added to all values.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    shift: float = 0.0

    def pick(self, values: np.ndarray) -> np.ndarray:
        """The rows of one source, [..., out, n]; rows of numbers and of packed bytes alike."""
        return values if self.rows is None else values.take(self.rows, axis=_row_axis(values.shape))


def gguf_tensors(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[GgufTensor]:
    """The tensors of a GGUF file for a model with tensors of these shapes on disk, in the order of the model, without
    those that no model computes with.

    Raises BillhookError for a tensor that has no name, and for experts that are missing.
    """
    import gguf

    family = gguf_family(config)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}.get(family.arch)
    if arch is None:
        raise BillhookError(f"The installed package gguf does not know {family.arch} models: pip install -U gguf.")
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    found: dict[str, GgufTensor] = {}
    blocks = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    used = {name: shape for name, shape in shapes.items() if not is_unused(name, shapes, *blocks)}
    for source, key, rows in _parts(config, family, used):
        name = names.get_name(key, try_suffixes=(".weight", ".bias")) or names.get_name(f"model.{key}", (".weight",))
        if name is None:
            raise BillhookError(
                f"{source} has no name in GGUF files of {family.arch} models. If the model does not need it, "
                "save the checkpoint without it."
            )
        shape = list(shapes[source])
        if rows is not None:
            shape[_row_axis(shape)] = len(rows)
        shift = family.shift if source.endswith("norm.weight") else 0.0
        sources = (*(found[name].sources if name in found else ()), source)
        found[name] = GgufTensor(name, sources, tuple(shape), rows, shift)
    return [_stacked(tensor, config) for tensor in found.values()]


def _parts(
    config: Mapping[str, Any], family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """Tensor on disk, its name for the tables of `gguf`, and the rows taken; experts in order of their numbers."""
    heads = config["num_attention_heads"]
    permuted = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads} if family.permuted else {}
    tied = config.get("tie_word_embeddings") and not any(name.endswith("embed_tokens.weight") for name in shapes)
    for source in sorted(shapes, key=_in_order):
        if source == HEAD and tied:  # the only copy
            yield source, "model.embed_tokens.weight", None
            continue
        if source == HEAD and family.shift:  # Gemma's head is its embedding
            continue
        if expert := _EXPERT.fullmatch(source):
            place = "feed_forward" if expert[3] in ("w1", "w2", "w3") else "mlp"
            prefix = expert[1].removeprefix("model.") if place == "feed_forward" else expert[1]
            yield source, f"{prefix}{place}.experts.{expert[3]}.weight", None
        elif fused := _FUSED.fullmatch(source):
            half = shapes[source][-2] // 2
            parts = {"gate_proj": np.arange(half), "up_proj": np.arange(half, 2 * half)}
            for part, rows in parts.items() if fused[2] == "gate_up_proj" else [("down_proj", None)]:
                yield source, f"{fused[1]}{part}.weight", rows
        else:
            module = source.split(".")[-2] if "." in source else ""
            rows = rotary_order(shapes[source][0], permuted[module]) if module in permuted else None
            yield source, source, rows


def rotary_order(rows: int, heads: int) -> np.ndarray:
    """The order in which llama.cpp wants the rows of q or k: int64 [rows]."""
    order: np.ndarray = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
    return order


def _row_axis(shape: Sequence[int]) -> int:
    return max(0, len(shape) - 2)


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names by the numbers in them."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _stacked(tensor: GgufTensor, config: Mapping[str, Any]) -> GgufTensor:
    if "_exps." not in tensor.name or len(tensor.shape) == 3:
        return tensor
    count = config.get("num_local_experts") or config.get("num_experts")
    if len(tensor.sources) != count:
        raise BillhookError(f"{tensor.name} needs {count} experts, and there are {len(tensor.sources)} on disk.")
    return GgufTensor(tensor.name, tensor.sources, (len(tensor.sources), *tensor.shape), tensor.rows)
