"""Tiny random image classifiers of every supported architecture, built from configs: 32 x 32 pixels, 10 classes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, Dinov2Config, Dinov2Model, PreTrainedModel

SIZE, CLASSES = 32, 10

_ONE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_ONE |= {"image_size": SIZE, "patch_size": 8}
_TOWER = {"vision_config": _ONE, "text_config": _ONE | {"vocab_size": 96}, "projection_dim": 32}
_STAGES = {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
_STAGES |= {"window_size": 4}
_CONVNEXT = {"num_stages": 3, "hidden_sizes": [16, 24, 32], "depths": [1, 2, 1], "image_size": SIZE}
_PVT = {
    "image_size": SIZE,
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}
CONFIGS: dict[str, dict] = {
    "vit": _ONE,
    "deit": _ONE,
    "beit": _ONE,
    "dinov2": _ONE | {"mlp_ratio": 2},
    "dinov2_with_registers": _ONE | {"mlp_ratio": 2},
    "ijepa": _ONE,
    "vit_msn": _ONE,
    "swin": _STAGES,
    "swinv2": _STAGES,
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "pvt_v2": _PVT,
    "clip": _TOWER,
    "siglip": _TOWER,
    "hiera": {
        "image_size": [SIZE, SIZE],
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "patch_size": [7, 7],
        "patch_stride": [4, 4],
        "masked_unit_size": [4, 4],
        "query_stride": [2, 2],
        "num_query_pool": 1,
    },
}
CONVOLUTIONAL: dict[str, dict] = {  # without linear layers in their blocks
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8},
}
ARCHETYPES = ("vit", "swin")  # one stack; stages that change the width
FAMILIES = [pytest.param(name, marks=() if name in ARCHETYPES else pytest.mark.nightly) for name in CONFIGS]


def family_class(family: str) -> str:
    """The name of the classifier's class: of several the first, as in published checkpoints."""
    names = AutoModelForImageClassification._model_mapping._model_mapping[family]
    return names if isinstance(names, str) else names[0]


def build(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random classifier of `family` in float32, with weights large enough that classes differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **((CONFIGS | CONVOLUTIONAL)[family] | {"num_labels": CLASSES} | changes))
        config.architectures = [family_class(family)]
        model = AutoModelForImageClassification.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def encoder() -> PreTrainedModel:
    """A random DINOv2 without a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Dinov2Model(Dinov2Config(**CONFIGS["dinov2"])).eval()
