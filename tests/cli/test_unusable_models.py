"""Models that cannot be pruned: what is wrong, where, and what to do, in one or two lines, with nothing written."""

from pathlib import Path

import pytest
import torch
from command import PRUNE, UP, done, edit, refused
from safetensors.torch import load_file, save_file


def test_a_model_path_that_does_not_exist_is_refused(place):
    refused(
        place,
        "prune",
        "modell",
        *PRUNE[2:],
        match=r"no model directory at modell\. Give an existing directory or a hub name",
    )
    refused(place, "measure", "./no/model", "-o", "t.json", match=r"no model directory at \./no/model")
    refused(place, "eval", "modell", "--data", "text.txt", match="no model directory at modell")


def test_a_directory_without_a_configuration_is_refused(place):
    (place / "model" / "config.json").unlink()
    refused(place, *PRUNE, match=r"model has no config\.json: give the directory of a Hugging Face model")


def test_a_file_is_refused_where_a_directory_is_needed(place):
    refused(place, "prune", "model/config.json", *PRUNE[2:], match="is a file: give the model directory")


def test_pickled_weights_are_refused(place):
    torch.save({}, "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    refused(place, *PRUNE, match=r"pickled weights \(pytorch_model\.bin\).*Convert them.*save_pretrained")


def test_missing_and_damaged_weights_are_refused(place):
    weights = Path("model/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    refused(
        place,
        *PRUNE,
        match=r"model\.safetensors holds .* bytes where its header promises .*: copy or download it again",
    )
    weights.unlink()
    refused(place, *PRUNE, match=r"no model\.safetensors .*the weights are missing")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(place, bad):
    weights = load_file("model/model.safetensors")
    weights[f"{UP}.weight"][3, 5] = bad
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    refused(place, *PRUNE, match=rf"{UP}\.weight holds 1 NaN or infinite weights: repair the checkpoint")
    refused(place, "measure", "model", "-o", "other.json", match=rf"{UP}\.weight holds 1 NaN")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"]
)
def test_weights_outside_the_layers_that_are_not_finite_are_refused(place, name):
    weights = load_file("model/model.safetensors")
    weights[name][..., 2] = float("nan")
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    refused(place, *PRUNE, match=rf"{name} holds \d+ NaN or infinite weights")
    refused(place, "generate", "model", "a", match="predictions are NaN", code=1)


def test_a_quantization_config_of_null_means_none(place):
    edit("model/config.json", quantization_config=None)
    done(*PRUNE, "--dry-run")


def test_a_model_of_another_kind_is_refused(place):
    edit("model/config.json", architectures=["BartModel"], model_type="bart", is_encoder_decoder=True)
    refused(place, *PRUNE, match="model is BartModel: only models for image-text-to-text, text-generation, fill-mask")


def test_weights_that_do_not_fit_the_configuration_are_refused(place):
    edit("model/config.json", intermediate_size=96)
    refused(
        place,
        *PRUNE,
        match=r"does not fit its config\.json: the tensor model\.layers\.0\.mlp\.down_proj\.weight has another shape",
    )
