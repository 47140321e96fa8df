"""A GGUF file as the model directory that it was made from: configuration and weights, dequantized.

The inverse of `billhook.architectures.gguf_config` and `gguf_names`, for the same families. `transformers` reads GGUF
files too (`gguf_file=`), but without the scaling of rotary embeddings of Llama 3, Phi 3 and YaRN, without Mixtral's
experts and with other defaults for Gemma's attention, and says nothing.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.architectures.gguf_config import (
    PATTERN,
    layer_types,
    llama3_factors,
    longrope_attention,
    size_names,
    yarn_attention,
)
from billhook.architectures.gguf_names import FAMILIES, Family, GgufTensor, gguf_tensors
from billhook.errors import BillhookError
from billhook.store.gguf_file import GgufFile
from billhook.store.tensor_bytes import DTYPES, tensor_bytes

_LARGEST = 1 << 31  # of all numbers in the metadata


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The configuration of the model in a file; raises BillhookError for an unknown architecture and missing sizes."""
    from transformers import AutoConfig

    arch = file.arch
    kinds = [kind for kind, family in FAMILIES.items() if family.arch == arch]
    if not kinds:
        known = ", ".join(sorted({family.arch for family in FAMILIES.values()}))
        raise BillhookError(f"{file.path} is a {arch:.40} model, which is not read from GGUF files (known: {known}).")
    own = {key.removeprefix(f"{arch}."): _plain(found.value, key, file) for key, found in file.metadata.items()}
    kind = "mixtral" if arch == "llama" and own.get("expert_count") else kinds[0]
    known_names = AutoConfig.for_model(kind).to_dict()
    config: dict[str, Any] = {"model_type": kind}
    for key, names in size_names(arch).items():
        if key in own:
            config[next((name for name in names if name in known_names), names[0])] = own[key]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if type(config.get(name)) is not int or not 0 < config[name] < 1 << 24:
            raise BillhookError(f"{file.path} has no {name} in its metadata.")
    _check_counts(file, config["num_hidden_layers"], own.get("expert_count") or 0)
    if "token_embd.weight" not in file.tensors:
        raise BillhookError(f"{file.path} has no token_embd.weight.")
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    config |= {name: tensor in file.tensors for name, tensor in biases.items() if name in known_names}
    config |= {"vocab_size": file.tensors["token_embd.weight"].shape[0]}
    config |= {"tie_word_embeddings": "output.weight" not in file.tensors}
    tokens = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    config |= {name: own.get(f"tokenizer.ggml.{key}_token_id") for name, key in tokens.items()}
    config |= _attention(FAMILIES[kind], config, own, file)
    return config | {key: FAMILIES[kind].computed(key, config) for key in FAMILIES[kind].assumed}


def _check_counts(file: GgufFile, blocks: int, experts: Any) -> None:
    """Raise BillhookError unless the tensors are of so many blocks and experts, before a model of them is made."""
    numbers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    stacked = sorted({entry.shape[0] for name, entry in file.tensors.items() if "_exps." in name})
    for what, found, wanted in (("blocks", [len(numbers)], blocks), ("experts", stacked or [0], experts)):
        if found != [wanted]:
            has = f"has {', '.join(map(str, found))} {what}, and {wanted!r:.20} in its metadata"
            raise BillhookError(f"{file.path} {has}: download it again.")


def _plain(value: Any, key: str, file: GgufFile) -> Any:
    """A number of the metadata as a person wrote it: 1e-06, not 9.999999974752427e-07; raises BillhookError for one
    that no size or factor of a model can be."""
    if isinstance(value, int | float) and not abs(value) < _LARGEST:
        raise BillhookError(f"{file.path}: {key[:100]!r} is {value}, which no model has.")
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _attention(family: Family, config: Mapping[str, Any], own: Mapping[str, Any], file: GgufFile) -> dict[str, Any]:
    """Rotary embedding and windows."""
    width = own.get("attention.key_length") or config["hidden_size"] // config["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    if own.get("rope.scaling.type") in ("linear", "yarn"):
        rope |= {"rope_type": own["rope.scaling.type"], "factor": own["rope.scaling.factor"]}
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        names["original_max_position_embeddings"] = "original_context_length"
        rope |= {name: own[f"rope.scaling.{key}"] for name, key in names.items() if f"rope.scaling.{key}" in own}
        if rope["rope_type"] == "yarn" and (factor := own.get("rope.scaling.attn_factor")):
            rope["attention_factor"] = factor * yarn_attention({"factor": rope["factor"]})
    if "rope_freqs.weight" in file.tensors:
        rope |= _llama3(file, rope, width)
    found: dict[str, Any] = {"rope_parameters": rope} | ({"head_dim": width} if family.arch != "phi3" else {})
    if family.arch == "phi3":
        rope["partial_rotary_factor"] = own["rope.dimension_count"] / width
        original = own["rope.scaling.original_context_length"]
        found |= {
            "original_max_position_embeddings": original,
            "sliding_window": own.get("attention.sliding_window") or None,
        }
        for name in ("long", "short"):
            if entry := file.tensors.get(f"rope_factors_{name}.weight"):
                rope |= {
                    "rope_type": "longrope",
                    f"{name}_factor": [_plain(x, entry.name, file) for x in file.values(entry).tolist()],
                }
                rope["original_max_position_embeddings"] = original
        factor = own.get("rope.scaling.attn_factor")
        usual = longrope_attention({}, config["max_position_embeddings"] / original, original)
        if factor and not math.isclose(factor, usual, rel_tol=1e-6):
            rope["attention_factor"] = factor
    if family.period is not None:
        found["layer_types"] = layer_types(own.get(PATTERN, family.period), config["num_hidden_layers"])
    if family.arch == "gemma3":
        local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
        found["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return found


def _llama3(file: GgufFile, rope: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The scaling of which the file has the factors; raises BillhookError for factors of another kind."""
    factors = torch.from_numpy(file.values(file.tensors["rope_freqs.weight"]).copy())
    fits = factors.shape == (-(-width // 2),)  # before anything as wide as the metadata say is made
    for power in range(5, 21) if fits else ():
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 1 << power}
        expected = llama3_factors({**rope, **scaling}, width)
        if torch.allclose(expected, factors, rtol=1e-5):
            return scaling
    raise BillhookError(f"{file.path} scales its rotary embedding in a way that transformers does not know.")


def write_weights(file: GgufFile, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Write the tensors of a file, dequantized, as safetensors: those named in `shapes`, one GGUF tensor at a time.

    float16 and bfloat16 stay as they are; everything else becomes float32, exactly. Raises BillhookError
    unless the file has exactly the tensors of the model.
    """
    described, held = (sum(map(math.prod, x)) for x in (shapes.values(), [e.shape for e in file.tensors.values()]))
    if described > held:  # before anything of that size is made
        raise BillhookError(f"{file.path} holds {held:,} weights, and its metadata describes a model of {described:,}.")
    plan = {tensor.name: tensor for tensor in gguf_tensors(config, shapes)}
    for name in sorted(plan.keys() ^ {name for name in file.tensors if not name.startswith("rope_f")}):
        what = "has no" if name in plan else "has a tensor that is not in its architecture:"
        raise BillhookError(f"{file.path} {what} {name}.")
    for name, tensor in plan.items():
        if file.tensors[name].shape != tensor.shape:
            raise BillhookError(f"{file.path}: {name} is {list(file.tensors[name].shape)}, not {list(tensor.shape)}.")
    kinds = {entry.type for entry in file.tensors.values() if len(entry.shape) > 1}
    kind = "F16" if kinds == {"f16"} else "BF16" if kinds == {"bf16"} else "F32"
    dtype = DTYPES[kind]
    names = [source for tensor in plan.values() for source in tensor.sources]
    size = {name: int(np.prod(shapes[name])) * dtype.itemsize for name in names}
    header, place = {}, 0
    for name in names:
        header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [place, place + size[name]]}
        place += size[name]
    text = json.dumps(header).encode()
    with open(path, "wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for tensor in plan.values():
            for part in _sources(file, tensor):
                output.write(tensor_bytes(part.to(dtype).contiguous()))


def _sources(file: GgufFile, tensor: GgufTensor) -> Iterator[Tensor]:
    """The tensors on disk of which a GGUF tensor consists, float32."""
    values = torch.from_numpy(file.values(file.tensors[tensor.name])) - tensor.shift
    for part in values if len(tensor.sources) > 1 else [values]:
        if tensor.rows is not None:
            part = torch.empty_like(part).index_copy_(0, torch.from_numpy(tensor.rows), part)
        yield part
