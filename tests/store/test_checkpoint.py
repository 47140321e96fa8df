"""Model directories: found, refused with a reason, loaded whole or not at all."""

import codecs
import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from billhook import prune
from billhook.errors import BillhookError
from billhook.store.checkpoint import check_directory, load_tokenizer, model_digest, resolve
from billhook.tasks.opening import load_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    """A copy of the model directory to damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in llama.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))


def edit_weights(directory: Path, change) -> None:
    save_file(
        change(load_file(directory / "model.safetensors")), directory / "model.safetensors", metadata={"format": "pt"}
    )


def test_an_existing_directory_is_resolved_to_itself(llama):
    assert resolve(str(llama)) == llama == resolve(llama)


@pytest.mark.parametrize(
    "name", ["no/such/dir/here", "./missing", "missing", "/nowhere/at/all", "spaces are no name/x"]
)
def test_a_path_that_does_not_exist_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BillhookError, match="no model directory at"):
        resolve(name)


def test_a_file_is_refused_as_a_model(llama):
    with pytest.raises(BillhookError, match=r"is a file: give the model directory"):
        resolve(llama / "config.json")


def test_a_hub_name_without_network_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        BillhookError, match=r"Cannot download someone/some-model from the hub \(.*\)\. Check the network"
    ) as found:
        resolve("someone/some-model")
    assert "\n" not in str(found.value)


def test_a_directory_without_config_json_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(BillhookError, match=r"has no config.json"):
        check_directory(copy)


def test_a_configuration_that_is_not_json_is_refused(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(BillhookError, match="not valid json"):
        check_directory(copy)


def test_a_directory_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(BillhookError, match="weights are missing"):
        check_directory(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(copy, name):
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(BillhookError, match=rf"pickled weights \({name}\).*save_pretrained"):
        check_directory(copy)


def test_a_quantized_checkpoint_is_refused(copy):
    edit_config(copy, quantization_config={"quant_method": "gptq"})
    with pytest.raises(BillhookError, match="quantized checkpoint"):
        check_directory(copy)


@pytest.mark.parametrize("packed", ["qweight", "weight_packed", "weight.absmax", "SCB"])
def test_a_quantized_checkpoint_is_refused_by_its_tensors_where_its_configuration_does_not_say_so(copy, packed):
    save_file(load_file(copy / "model.safetensors") | {f"layer.{packed}": torch.zeros(2)}, copy / "model.safetensors")
    with pytest.raises(BillhookError, match=rf"is a quantized checkpoint \(its files hold layer.{packed}\)"):
        check_directory(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["BartModel"], "model_type": "bart", "is_encoder_decoder": True},
    ],
)
def test_a_model_of_another_kind_is_refused(copy, changes):
    edit_config(copy, **changes)
    with pytest.raises(
        BillhookError,
        match=r"only models for image-text-to-text, .* and automatic-speech-recognition can be pruned",
    ):
        load_model(copy)


def test_truncated_weights_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BillhookError, match=r"holds \d+ bytes where its header promises \d+"):
        load_model(copy)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0" + b'{"a":{"dtype":1}']
)
def test_weights_that_are_no_safetensors_are_refused(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(BillhookError, match=r"model\.safetensors (is not a safetensors file|has a damaged)"):
        check_directory(copy)


def write_index(directory: Path, content) -> None:
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")  # which would be read instead
    (directory / "model.safetensors.index.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b.safetensors", 3]
)
def test_an_index_must_stay_in_its_directory(copy, name):
    write_index(copy, {"weight_map": {"a": name}})
    with pytest.raises(BillhookError, match=r"only plain file names|must be a string, found 3"):
        check_directory(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_a_broken_index_is_refused(copy, content):
    write_index(copy, content)
    with pytest.raises(BillhookError, match=r"is not a safetensors index|weight_map(, a)?: must be"):
        check_directory(copy)


def test_missing_shard_is_named(tmp_path):
    model = tiny.save(tmp_path / "model", shard="60KB")
    (model / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    shard = sorted(model.glob("model-*"))[-1]
    shard.unlink()
    with pytest.raises(BillhookError, match=r"names model-0000\d-of-0000\d\.safetensors, which is not in"):
        check_directory(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "model.layers.2.mlp.up_proj.weight"},
            "layers.2.mlp.up_proj.weight is missing",
        ),
        (
            lambda w: w | {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 3)},
            "layers.1.mlp.up_proj.weight has another shape",
        ),
        (lambda w: w | {"lm_head.bias": torch.ones(258)}, "lm_head.bias has no place in the model"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(copy, change, message):
    edit_weights(copy, change)
    with pytest.raises(BillhookError, match=message):
        load_model(copy)


def test_loads_quietly_in_evaluation_mode_and_the_dtype_asked_for(llama, tmp_path, capfd):
    half = tiny.save(tmp_path / "half", dtype=torch.bfloat16)
    assert load_model(half, dtype="bfloat16").dtype == torch.bfloat16
    model = load_model(half, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert capfd.readouterr().err.replace("\r", "").count("Loading") == 0
    with pytest.raises(BillhookError, match="Unknown dtype 'int3'"):
        load_model(half, dtype="int3")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", None])
def test_a_dtype_in_the_configuration_in_which_no_model_is_computed_is_that_of_the_files(copy, dtype, llama):
    edit_config(copy, dtype=dtype)
    model = load_model(copy)
    assert model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model(llama).parameters(), strict=True))
    assert prune(copy, sparsity=0.5, criterion="magnitude", output=copy.parent / "out").sparsity == 0.5
    assert json.loads((copy.parent / "out" / "config.json").read_text())["dtype"] == dtype


def test_an_unknown_device_is_refused(llama):
    with pytest.raises(BillhookError, match="Cannot compute on device 'warp'"):
        load_model(llama, device="warp")


def test_code_of_a_model_runs_only_with_permission(copy):
    edit_config(
        copy,
        model_type="made_up",
        architectures=["MadeUp"],
        auto_map={"AutoModelForCausalLM": "code.MadeUp", "AutoConfig": "code.C"},
    )
    (copy / "code.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(BillhookError, match="needs its own Python code"):
        load_model(copy)


def test_experts_can_be_observed(tmp_path):
    model = load_model(tiny.save(tmp_path / "m", tiny.mixtral(), words=False))
    assert model.config._experts_implementation == "eager"


def test_a_tokenizer_is_loaded_none_or_refused(copy):
    tokenizer = load_tokenizer(copy)
    assert tokenizer("ab")["input_ids"] == [256, *tiny.tokenizer()("ab")["input_ids"][1:]]
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(BillhookError, match="cannot load the tokenizer"):
        load_tokenizer(copy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert load_tokenizer(copy) is None


def test_the_digest_differs_between_models(llama, copy):
    assert model_digest(llama) == model_digest(copy)
    edit_weights(copy, lambda w: {k: v + 0 if "norm" not in k else v * 2 for k, v in w.items()})
    assert model_digest(llama) != model_digest(copy)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_a_byte_order_mark_that_transformers_refuses_is_named(tmp_path, name):
    copy = tiny.save(tmp_path / "model", shard="40KB")
    (copy / name).write_bytes(codecs.BOM_UTF8 + (copy / name).read_bytes())
    with pytest.raises(BillhookError, match="UTF-8 BOM"):
        load_tokenizer(copy) if name.startswith("tokenizer") else load_model(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", r"pip install sentencepiece protobuf$"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_the_packages_that_a_tokenizer_needs_are_named(tmp_path, monkeypatch, content, message):
    """A file tokenizer.model is a SentencePiece model or a list for tiktoken."""
    copy = tiny.save(tmp_path / "model", words=False)
    (copy / "tokenizer.model").write_bytes(content)
    for module in ("sentencepiece", "google.protobuf", "tiktoken"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BillhookError, match=message):
        load_tokenizer(copy)
