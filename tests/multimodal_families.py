"""Tiny random image-text models of every supported architecture, built from configs, and inputs for them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

SIZE, VOCABULARY, IMAGE = 32, 96, 95  # pixels, tokens, the token that stands for a part of an image

_TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_VISION = _TEXT | {"image_size": SIZE, "patch_size": 8}
_TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
_TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {"image_token_id": IMAGE, "image_token_index": IMAGE}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return _TEXT | {"model_type": kind} | more


def _vision(kind: str, **more: Any) -> dict[str, Any]:
    return _VISION | {"model_type": f"{kind}_vision_model"} | more


_PATCHES = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 8}
_PATCHES |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
_SPECIAL = {"video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return _TEXT | {"rope_parameters": rope | more}


_GRID = {"image_grid_pinpoints": [[SIZE, SIZE], [SIZE, 2 * SIZE]]}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": _vision("clip"), "text_config": _text("llama"), "vision_feature_layer": -2},
    "llava_next": {"vision_config": _vision("clip"), "text_config": _text("llama"), **_GRID},
    "llava_onevision": {"vision_config": _vision("siglip"), "text_config": _text("qwen2"), **_GRID},
    "qwen2_5_vl": {
        "vision_config": _PATCHES | {"fullatt_block_indexes": [2], "window_size": 32},
        "text_config": _rope(1, 1, 2),
        **_SPECIAL,
    },
    "qwen3_vl": {
        "vision_config": _PATCHES | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        "text_config": _rope(2, 1, 1),
        **_SPECIAL,
    },
    "gemma3": {
        "vision_config": _vision("siglip"),
        "text_config": _TEXT | {"sliding_window": 16},
        "mm_tokens_per_image": 4,
        "boi_token_index": 93,
        "eoi_token_index": 92,
    },
    "idefics3": {"vision_config": _VISION, "text_config": _text("llama"), "scale_factor": 2},
    "smolvlm": {"vision_config": _VISION, "text_config": _text("llama"), "scale_factor": 2},
    "paligemma": {"vision_config": _vision("siglip"), "text_config": _text("gemma"), "projection_dim": 32},
    "internvl": {
        "vision_config": _VISION | {"image_size": [SIZE, SIZE], "patch_size": [8, 8]},
        "text_config": _text("qwen2"),
        "downsample_ratio": 0.5,
    },
    "mllama": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_global_layers": 2,
            "attention_heads": 4,
            "image_size": SIZE,
            "patch_size": 8,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [1],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "text_config": _TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    },
    "blip-2": {
        "vision_config": _VISION,
        "qformer_config": _VISION | {"num_hidden_layers": 2, "encoder_hidden_size": 32, "vocab_size": VOCABULARY},
        "text_config": {
            "model_type": "opt",
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
        },
        "num_query_tokens": 4,
    },
    "mistral3": {
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
        "text_config": _text("mistral"),
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
    "aya_vision": {
        "vision_config": _vision("siglip"),
        "text_config": _text("cohere2"),
        "downsample_factor": 2,
        "vision_feature_layer": -1,
    },
    "glm4v": {
        "vision_config": _PATCHES | {"image_size": SIZE},
        "text_config": _rope(1, 1, 2, partial_rotary_factor=1.0),
        "image_start_token_id": 93,
        "image_end_token_id": 92,
        "video_start_token_id": 91,
        "video_end_token_id": 90,
    },
}
ARCHETYPES = ("llava", "qwen3_vl")  # two towers, one with a dead block; features that are added between blocks
FAMILIES = [pytest.param(name, marks=() if name in ARCHETYPES else pytest.mark.nightly) for name in CONFIGS]

_PLACES = {"llava": 16, "paligemma": 16, "llava_next": 36, "llava_onevision": 36, "mllama": 1}  # of an image, else 4


def build(family: str, seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any) -> PreTrainedModel:
    """A random model of `family` in float32, with weights large enough that answers differ."""
    options = _IMAGE | CONFIGS[family] | changes
    options["text_config"] = options["text_config"] | {"vocab_size": vocabulary}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **options))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            elif parameter.ndim and not parameter.any():  # such as gates of cross-attention
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch(family: str, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs: an image in the middle of ten tokens, of which the last two are the answer."""
    random = torch.Generator().manual_seed(seed)
    rows = 1 if family in ("qwen2_5_vl", "qwen3_vl", "glm4v") else rows  # their patches are one list
    words = torch.randint(3, 80, (rows, 10), generator=random)
    image = torch.full((rows, _PLACES.get(family, 4)), IMAGE)
    ids = torch.cat([words[:, :3], image, words[:, 3:]], 1)
    labels = ids.clone()
    labels[:, :-2] = -100
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("idefics3", "smolvlm"), (1, 3, SIZE, SIZE))
    shapes |= dict.fromkeys(("llava_next", "llava_onevision"), (2, 3, SIZE, SIZE)) | {"mllama": (1, 2, 3, SIZE, SIZE)}
    pixels = torch.randn(rows, *shapes.get(family, (3, SIZE, SIZE)), generator=random)
    found = {"input_ids": ids, "pixel_values": pixels, "labels": labels}
    if family in ("gemma3", "paligemma"):
        found["token_type_ids"] = (ids == IMAGE).long()
    if family in ("llava_next", "llava_onevision", "mistral3"):
        found["image_sizes"] = torch.tensor([[SIZE, SIZE]] * rows)
    if family in ("qwen2_5_vl", "qwen3_vl", "glm4v"):
        found["pixel_values"] = torch.randn(16, 3 * 2 * 8 * 8, generator=random)
        found |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).long()}
    if family == "mllama":
        found |= {"aspect_ratio_ids": torch.ones(rows, 1).long(), "aspect_ratio_mask": torch.tensor([[[1, 0]]] * rows)}
        found["cross_attention_mask"] = torch.ones(rows, ids.shape[1], 1, 2).long()
    return found
