"""What quantize accepts, stock transformers opens, and what it refuses for that reason, transformers does not open."""

from pathlib import Path

import families
import multimodal_families
import pytest
import tiny
import torch
import vision_families
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from billhook.errors import BillhookError
from billhook.steps import quantization_config, quantize
from billhook.steps.compress import CompressRequest, check

pytestmark = pytest.mark.gate


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


BUILT = {name: (module.build, name) for module in (families, vision_families) for name in module.CONFIGS}
BUILT |= {name: (multimodal_families.build, name) for name in multimodal_families.CONFIGS} | {"t5": (t5,)}
QUICK = ("llama", "vit", "siglip", "t5")
MATRIX = [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in BUILT]


def built(family: str, folder: Path) -> PreTrainedModel:
    """A model of a family, which is saved in `folder`."""
    build, *name = BUILT[family]
    model: PreTrainedModel = build(*name)
    tiny.save(folder, model, words=False)
    return model


@pytest.mark.parametrize("family", MATRIX)
def test_what_quantize_accepts_stock_transformers_opens(tmp_path, family, monkeypatch):
    model, refused = built(family, tmp_path / "model"), False
    stacks = "all" if family in multimodal_families.CONFIGS else ()
    fields = {"quantizer": "round", "stacks": stacks}
    try:
        quantize.quantize(tmp_path / "model", "int8", tmp_path / "out", **fields)
    except BillhookError as error:
        if "cannot open" not in str(error):
            return  # such as experts
        refused = True
        monkeypatch.setattr(quantize, "check_opens", lambda *given: None)
        quantize.quantize(tmp_path / "model", "int8", tmp_path / "out", **fields)
    if refused:
        with pytest.raises((AttributeError, ValueError)):
            type(model).from_pretrained(tmp_path / "out")
        return
    _, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.nightly
def test_a_refusal_names_what_to_leave_out_and_the_rest_opens(tmp_path):
    built("gemma3", tmp_path / "model")
    fields = {"quantizer": "round", "stacks": "all"}
    with pytest.raises(BillhookError, match=r"leave them out with ignore=.model\.vision_tower\.encoder\.layers.") as e:
        quantize.quantize(tmp_path / "model", "int8", tmp_path / "out", **fields)
    assert "language_model" not in str(e.value)
    ignore = "model.vision_tower.encoder.layers"
    quantize.quantize(tmp_path / "model", "int8", tmp_path / "out", ignore=ignore, **fields)


def test_without_accelerate_the_same_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization_config, "find_spec", lambda name: None)
    for family in ("siglip", "vit"):
        built(family, tmp_path / family)
    quantize.quantize(tmp_path / "vit", "int8", tmp_path / "out", quantizer="round")
    with pytest.raises(BillhookError, match="cannot open a SiglipForImageClassification"):
        quantize.quantize(tmp_path / "siglip", "int8", tmp_path / "second", quantizer="round")


def test_compress_refuses_before_it_measures(tmp_path):
    built("siglip", tmp_path / "model")
    fields = {"bits": 30, "target": "transformers", "calibration": torch.zeros(8, 3, 32, 32), "samples": 4}
    request = CompressRequest(tmp_path / "model", tmp_path / "out", **fields)
    with pytest.raises(BillhookError, match="cannot open a SiglipForImageClassification"):
        check(request)
