"""Facts from configurations: context length, vocabulary, special tokens, and the options of a call."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.store.checkpoint import class_names


def text_config(config: Any) -> Any:
    """The configuration of the text decoder, which is the configuration itself for a language model."""
    return config.get_text_config(decoder=True)


def context_length(config: Any) -> int | None:
    """The model's context in tokens, or None where its configuration names no limit."""
    text = text_config(config)
    for name in ("max_position_embeddings", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def positions_needed(config: Any, prompt: int, new: int) -> int:
    """The context that a prompt and `new` generated tokens need; an encoder reads the prompt apart from the others, of
    which the first is a start token."""
    return max(prompt, 1 + new) if getattr(config, "is_encoder_decoder", False) else prompt + new


def check_length(config: Any, length: int) -> None:
    """Raise BillhookError when windows of `length` tokens are longer than the model's context."""
    longest = context_length(config)
    if longest is not None and length > longest:
        context = f"the model's context of {longest}"
        raise BillhookError(f"Windows of {length} tokens exceed {context}: use --length {longest} or less.")


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of token embeddings of the model."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def classes_of(model: PreTrainedModel) -> int:
    """The number of outputs of a prediction: tokens of the vocabulary, or classes."""
    return vocabulary_size(model) if model.main_input_name == "input_ids" else int(model.config.num_labels or 1)


def hidden_width(model: PreTrainedModel) -> int:
    """The width of the hidden states of the first block."""
    config = model.config
    text = text_config(config) if model.main_input_name == "input_ids" else getattr(config, "vision_config", config)
    sizes: Any = getattr(text, "hidden_sizes", None) or getattr(text, "embed_dim", None) or text.hidden_size
    return int(sizes[0] if isinstance(sizes, list | tuple) else sizes)


def is_headless(model: PreTrainedModel) -> bool:
    """Whether the model ends with its last norm or pooling: it has embeddings and no predictions."""
    known = class_names("AutoModel").values()
    return without_head(model) is model and type(model).__name__ in {name for names in known for name in names}


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the model, which may have no head, is of a kind that continues text."""
    kind = model.config.model_type
    return kind in class_names("AutoModelForCausalLM") and kind not in class_names("AutoModelForMaskedLM")


def predictions(model: PreTrainedModel, output: Any) -> Tensor:
    """What a model predicts: its logits, or, without a head, the pooled embedding of images [rows, width], or the last
    hidden states [rows, length, width]."""
    found = getattr(output, "logits", None)
    if found is None and model.main_input_name == "pixel_values":
        found = getattr(output, "pooler_output", None)
    if found is None:
        found = output.last_hidden_state
    assert isinstance(found, Tensor)
    return found


def positions(config: Any, pixels: tuple[int, ...]) -> int:
    """About how many tokens or positions an image [..., height, width] has in the first block."""
    vision = getattr(config, "vision_config", config)
    patch: Any = getattr(vision, "patch_stride", None) or getattr(vision, "strides", None)
    patch = patch or getattr(vision, "patch_size", 16)
    side = patch[0] if isinstance(patch, list | tuple) else patch
    return max(1, pixels[-1] * pixels[-2] // int(side) ** 2)


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model reads; 3 and 224 where its configuration has none."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(vision, "num_channels", None) or 3), int(height), int(width)


def named_tokens(config: Any) -> set[int]:
    """The token ids that a configuration, or one inside it, names: ends of a text, padding, places of images."""
    found, parts = set(), [config.to_dict()]
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif str(key).endswith(("_token_id", "_token_index")):
                found |= {token for token in (value if isinstance(value, list) else [value]) if token is not None}
    return found


def special_tokens(model: PreTrainedModel) -> tuple[int, set[int]]:
    """The token that starts a document (BOS, else EOS), and the tokens that end one; BillhookError without either."""
    configs = [config for config in (text_config(model.config), model.generation_config) if config is not None]
    starts = [config.bos_token_id for config in configs if getattr(config, "bos_token_id", None) is not None]
    ends = [config.eos_token_id for config in configs if getattr(config, "eos_token_id", None) is not None]
    known = [token for end in ends for token in (end if isinstance(end, list) else [end])]
    if not starts + known:
        raise BillhookError("The model names neither bos_token_id nor eos_token_id: add one to config.json.")
    return (starts + known)[0], set(known)


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """The size of the keys and values that the model caches for `tokens` tokens, in its own dtype."""
    config = text_config(model.config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * tokens)


def cache_name(model: PreTrainedModel) -> str:
    """What the model calls its key-value cache, as an argument and in its output; transformers has renamed it."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "cache_params") if name in known), "past_key_values")


def without_head(model: PreTrainedModel) -> nn.Module:
    """The base model, which computes the hidden states of the model's inputs; the model itself where its base is a
    part that takes others (DINOv3)."""
    base: nn.Module = model.base_model
    return base if model.main_input_name in inspect.signature(base.forward).parameters else model


def call_options(model: PreTrainedModel, *, base: bool = False) -> dict[str, Any]:
    """Options of a call of the model (or of `without_head`): no key-value cache, no auxiliary loss of routers."""
    known = inspect.signature((without_head(model) if base else model).forward).parameters
    passed_on = any(one.kind is one.VAR_KEYWORD for one in known.values()) and hasattr(
        text_config(model.config), "use_cache"
    )
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in known or passed_on else {}
    if not base and getattr(model.config, "output_router_logits", False):
        options["output_router_logits"] = False
    return options
