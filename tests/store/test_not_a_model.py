"""Whatever is given as a model and is none: a sentence says what it is and what makes a model of it."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from command import billhook
from safetensors.torch import save_file

from billhook.errors import BillhookError
from billhook.store.checkpoint import check_directory, resolve


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("whole") / "model", tiny.llama(num_hidden_layers=1), shard="60KB")


def made(folder: Path, **files: str) -> Path:
    """A directory of files with these contents; __ stands for a dot and ___ for a slash in their names."""
    for name, text in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


DIRECTORIES = {
    "adapter": (
        {"adapter_config__json": '{"base_model_name_or_path": "owner/base"}', "adapter_model__safetensors": ""},
        r"holds an adapter of owner/base, not a whole model\. Merge them with the package peft: AutoPeftModel",
    ),
    "broken adapter": ({"adapter_config__json": "[["}, "holds an adapter of its base model"),
    "adapter with a configuration": (
        {"adapter_config__json": '{"base_model_name_or_path": 3}', "config__json": '{"model_type": "llama"}'},
        "holds an adapter of 3, not a whole model",
    ),
    "cache root": (
        {"refs___main": "abc\n", "snapshots___abc___config__json": "{}", "snapshots___aaa___config__json": "{}"},
        r"is a folder of the hub's cache: give .*snapshots/abc, or the model's name on the hub",
    ),
    "empty cache root": ({"snapshots___abc___x": ""}, r"hub's cache: it holds no complete model, or"),
    "whole cache": (
        {"models--owner--name___snapshots___a___config__json": "{}"},
        r"is a cache of the hub: give one of its models by its name on the hub, owner/name\.",
    ),
    "gguf": ({"a__gguf": "", "b__gguf": ""}, r"holds GGUF files and no safetensors: give one .*, such as .*/a\.gguf\."),
    "mistral": (
        {"params__json": "{}", "consolidated__safetensors": ""},
        "the original format of Mistral or Meta: take",
    ),
    "meta": ({"params__json": "{}", "consolidated__00__pth": ""}, "the original format of Mistral or Meta: take"),
    "pickled": (
        {"config__json": '{"model_type": "llama"}', "pytorch_model__bin": ""},
        r"pickled weights \(pytorch_model\.bin\).*Convert them where you trust them: AutoModelForCausalLM",
    ),
    "pickled alone": ({"model__pt": ""}, r"pickled weights \(model\.pt\)"),
    "pipeline": ({"model_index__json": "{}", "unet___config__json": "{}"}, "is a pipeline of diffusers"),
    "one too high": ({"model___config__json": "{}", "notes__txt": ""}, r"has no config\.json: give .*/model\."),
    "no index": (
        {"config__json": '{"model_type": "llama"}', "model-00001-of-00002__safetensors": ""},
        r"holds model-00001-of-00002\.safetensors, but no model\.safetensors and no model\.safetensors\.index\.json",
    ),
    "configuration a folder": (
        {"config__json___a": ""},
        r"config\.json is a directory, not a file: put the file there",
    ),
    "weights a folder": (
        {"config__json": '{"model_type": "llama"}', "model__safetensors___a": ""},
        r"model\.safetensors is a directory, not a file",
    ),
    "index a folder": (
        {"config__json": "{}", "model__safetensors__index__json___a": "", "model-1__safetensors": ""},
        r"model\.safetensors\.index\.json is a directory, not a file",
    ),
    "named weights a folder": (
        {"config__json": '{"transformers_weights": "a.safetensors"}', "a__safetensors___b": ""},
        r"a\.safetensors, which config\.json names, is a directory",
    ),
    "other files": ({"notes__txt": ""}, r"has no config\.json: give the directory of a Hugging Face model"),
    "empty": ({}, r"has no config\.json"),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_is_no_model_is_named(name, tmp_path):
    files, match = DIRECTORIES[name]
    (tmp_path / "given").mkdir()
    with pytest.raises(BillhookError, match=match) as found:
        check_directory(made(tmp_path / "given", **files))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.zip", "is an archive: unpack it and give the model directory in it"),
        ("model.tar.gz", "is an archive"),
        ("pytorch_model.bin", r"pickled weights \(pytorch_model\.bin\)"),
        ("weights.safetensors", r"holds only weights: config\.json and the tokenizer's files are needed, too"),
        ("notes.txt", r"is a file: give the model directory that holds config\.json\."),
    ],
)
def test_a_file_that_is_given_as_a_model_is_named(name, match, tmp_path):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(BillhookError, match=match):
        resolve(str(tmp_path / name))


def test_a_file_inside_a_model_directory_names_the_directory(whole):
    for file in ("config.json", "model.safetensors.index.json", sorted(whole.glob("*.safetensors"))[0].name):
        with pytest.raises(BillhookError, match=rf"is a file: give the model directory .*, {whole}\."):
            resolve(whole / file)


def test_an_index_that_names_missing_files_is_refused_by_every_command(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "model")
    gone = sorted(Path("model").glob("*.safetensors"))[1]
    gone.unlink()
    for command in (
        ("prune", "model", "--sparsity", "0.5", "--criterion", "magnitude", "-o", "out"),
        ("measure", "model", "-o", "table.json"),
        ("eval", "model", "--data", "stdlib:heldout"),
        ("pack", "model", "-o", "out"),
    ):
        ran = billhook(*command)
        assert ran.code == 2
        assert f"names {gone.name}, which is not in model: copy or download the missing file." in ran.err


def test_the_conversions_that_are_advised_give_a_model(whole, tmp_path):
    """Those that need no other package."""
    from transformers import AutoModelForCausalLM

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    state = {k: v for f in whole.glob("*.safetensors") for k, v in load(f).items()}
    torch.save(state, pickled / "pytorch_model.bin")
    shutil.copyfile(whole / "config.json", pickled / "config.json")
    with pytest.raises(BillhookError, match=r"Convert them .*: AutoModelForCausalLM\.from_pretrained") as found:
        check_directory(pickled)
    code = str(found.value).rpartition(": ")[2].replace("NEW", repr(str(tmp_path / "new")))
    eval(code, {"AutoModelForCausalLM": AutoModelForCausalLM})
    assert check_directory(tmp_path / "new")["model_type"] == "llama"


def load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_single_file_becomes_a_model_as_advised(whole, tmp_path):
    save_file({k: v for f in whole.glob("*.safetensors") for k, v in load(f).items()}, tmp_path / "model.safetensors")
    with pytest.raises(BillhookError, match="put all into one directory and give that"):
        resolve(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((whole / "config.json").read_text())))
    assert check_directory(resolve(tmp_path))["model_type"] == "llama"
