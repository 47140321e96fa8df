"""Models that lie in memory, begin or draw numbers in their own way, through the whole tool."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from billhook import find_layers, load_model, prune, verify
from billhook.engine.streaming import open_streamed
from billhook.steps.slim import slim

pytestmark = pytest.mark.gate
RANDOM = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 96, (8, 16), generator=RANDOM)
PIXELS = {"pixel_values": torch.randn(8, 3, 32, 32, generator=RANDOM)}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
WORDS = SIZES | {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
IMAGES = SIZES | {"image_size": 32, "patch_size": 8}
HALF = {"sparsity": 0.5, "criterion": "wanda", "allocator": "uniform"}


def saved(folder, auto_class, family: str, **sizes):
    torch.manual_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(family, **sizes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return tiny.save(folder / "model", model.eval(), words=False)


def test_layers_that_are_rows_of_one_tensor_in_the_files_are_layers_of_their_own(tmp_path):
    source = saved(tmp_path, AutoModelForMaskedLM, "nomic_bert", **WORDS)
    assert any("qkv" in name.lower() for name in load_file(source / "model.safetensors"))
    names = [layer.name for layer in find_layers(open_streamed(source, "AutoModelForMaskedLM").model)]
    assert names == [layer.name for layer in find_layers(load_model(source))]
    given = {"calibration": IDS, **HALF}
    assert prune(source, output=tmp_path / "out", **given).sparsity == 0.5
    assert verify(tmp_path / "out").ok
    assert slim(source, 0.2, tmp_path / "small", units="heads", method="magnitude").removed > 0.05
    assert verify(tmp_path / "small").ok


def test_a_model_whose_base_takes_other_inputs_is_called_itself(tmp_path):
    source = saved(tmp_path, AutoModel, "dinov3_vit", **IMAGES)
    assert prune(source, output=tmp_path / "out", calibration=PIXELS, **HALF).sparsity == 0.5
    assert verify(tmp_path / "out").ok
    for units in ("channels", "blocks"):
        slim(source, 0.34, tmp_path / units, units=units, calibration=PIXELS)
        assert verify(tmp_path / units).ok


def test_a_decoder_with_a_configuration_of_its_own_begins_with_its_bos_token(tmp_path):
    part = WORDS | {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8, "query_pre_attn_scalar": 8}
    source = saved(tmp_path, AutoModelForSeq2SeqLM, "t5gemma", encoder=part, decoder=part, vocab_size=96)
    given = {"input_ids": IDS, "labels": IDS}
    assert prune(source, output=tmp_path / "out", calibration=given, **HALF).sparsity == 0.5
    assert verify(tmp_path / "out").ok


def test_a_model_that_draws_random_numbers_gives_the_same_result_every_time(tmp_path):
    source, found = saved(tmp_path, AutoModel, "vit_mae", **IMAGES), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        prune(source, output=tmp_path / str(seed), calibration=PIXELS, **HALF)
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append((tmp_path / str(seed) / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    slim(source, 0.34, tmp_path / "small", units="blocks", calibration=PIXELS)
    assert verify(tmp_path / "small").ok
