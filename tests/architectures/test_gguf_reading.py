"""A GGUF file gives back the model that it was made of, and a hostile one is one error."""

import json
import math
import tracemalloc
from pathlib import Path

import gguf_families
import numpy as np
import pytest
import tiny
import torch
from command import done
from gguf_bytes import ARRAY, BOOL, FLOAT32, FLOAT64, INT32, STRING, UINT32, changed
from live_memory import LiveMemory
from paths import DEMO

from billhook.architectures.sources import resolve
from billhook.errors import BillhookError, JobError
from billhook.export.gguf import write_gguf
from billhook.steps.export import export_dense
from billhook.steps.quantize import quantize
from billhook.store.checkpoint import load_tokenizer
from billhook.store.gguf_file import GgufValue, read_gguf
from billhook.tasks.opening import load_model

FAMILIES = [
    pytest.param(name, marks=pytest.mark.gate if name in ("mixtral", "gemma2") else pytest.mark.nightly)
    for name in gguf_families.CONFIGS
]
YARN = gguf_families.CONFIGS["qwen2:yarn"]["rope_parameters"]
LONG = gguf_families.CONFIGS["phi3:longrope"]["rope_parameters"]
DERIVED = {"transformers_version", "_name_or_path", "dtype", "initializer_range", "architectures", "model_type"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_back_with_the_same_weights_configuration_and_loss(name, tmp_path, capsys):
    model, source = gguf_families.build(name), gguf_families.save(tmp_path / "model", name)
    back = load_model(write_gguf(source, tmp_path / "model.gguf", rest="f32").path)
    for (key, value), (_, other) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=1e-7, msg=key)  # a norm of Gemma is stored plus 1
    ids, loss = gguf_families.losses(model)
    assert back(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, abs=1e-6)
    mine, other = model.config.to_dict(), back.config.to_dict()
    new = {"head_dim", "pretraining_tp", "attention_bias", "mlp_bias"}  # a mistral comes back as a llama
    different = {key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)}
    assert different <= DERIVED | {key for key in new if mine.get(key) is None}
    assert "model.gguf holds rounded weights: results are those of the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", {**YARN, "attention_factor": 2.0}),
        ("llama", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
        ("gemma2", {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
        ("phi3:longrope", {**LONG, "attention_factor": 2.0}),
        ("phi3:longrope", {**LONG, "factor": 8.0}),
    ],
)
def test_unusual_rotary_embeddings_are_read_back(name, rope, tmp_path):
    source = gguf_families.save(tmp_path / "model", name, rope_parameters=rope)
    back = load_model(write_gguf(source, tmp_path / "model.gguf", rest="f32").path)
    ids, loss = gguf_families.losses(gguf_families.build(name, rope_parameters=rope))
    assert back(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, abs=1e-6)
    assert gguf_families.losses(gguf_families.build(name))[1] != pytest.approx(loss, abs=1e-4)


def test_the_directory_of_a_file_is_made_once_and_named_like_it(tmp_path):
    path = write_gguf(gguf_families.save(tmp_path / "model", "llama"), tmp_path / "model.gguf").path
    directory = resolve(path)
    before = (directory / "config.json").stat().st_mtime_ns
    assert resolve(str(path)) == directory
    assert (directory / "config.json").stat().st_mtime_ns == before
    assert directory.name == "model.gguf"
    (tmp_path / "model" / "model.safetensors").unlink()
    path.rename(tmp_path / "model" / "model.gguf")
    assert resolve(tmp_path / "model") == directory  # of a directory with a file instead of weights too
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    assert tokenizer(tiny.TEXT)["input_ids"] == load_tokenizer(DEMO)(tiny.TEXT)["input_ids"]


@pytest.mark.gate
def test_a_file_is_pruned_verified_and_evaluated_like_a_directory(tmp_path, monkeypatch):
    source = gguf_families.save(tmp_path / "model", "llama")
    tiny.text_file(tmp_path / "text.txt", 20)
    monkeypatch.chdir(tmp_path)
    done("export", source, "-o", "model.gguf", "--type", "q8_0")
    pruned = done("prune", "model.gguf", "-o", "pruned", "--sparsity", "0.5", "--criterion", "magnitude")
    assert pruned.err.count("model.gguf holds rounded weights") == 1
    assert json.loads(Path("pruned/billhook.json").read_text())["steps"][0]["model"]["name"] == "model.gguf"
    done("verify", "pruned")
    score = ("--data", "text.txt", "--length", "32", "--limit", "4", "--json")
    losses = [done("eval", name, *score).json["nll"] for name in ("model", "model.gguf")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.gate
def test_a_hostile_file_is_one_error(tmp_path):
    source = gguf_families.save(tmp_path / "model", "llama", num_hidden_layers=1)
    good = write_gguf(source, tmp_path / "good.gguf").path.read_bytes()
    header, random = good.index(b"blk.0.ffn_up.weight"), np.random.default_rng(0)
    path = tmp_path / "bad.gguf"
    messages = []
    for _ in range(60):
        data = bytearray(good)
        for place in random.integers(24, header, size=3):
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            resolve(path)
        except (BillhookError, JobError) as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert not any("\n" in message for message in messages)


METADATA = {  # by family: a key, its value (None: left out), and what is said of it
    "llama": [
        ("llama.block_count", GgufValue(1 << 31, UINT32), "which no model has"),
        ("llama.block_count", GgufValue(1 << 23, UINT32), "has 1 blocks, and 8388608 in its metadata"),
        ("llama.block_count", GgufValue("1", STRING), "has no num_hidden_layers"),
        ("llama.block_count", None, "has no num_hidden_layers"),
        ("llama.embedding_length", GgufValue(1 << 20, UINT32), r"describes a model of [\d,]+"),
        ("llama.attention.head_count", GgufValue(0, UINT32), "has no num_attention_heads"),
        ("llama.attention.head_count", GgufValue([4], ARRAY, UINT32), "has no num_attention_heads"),
        ("llama.attention.head_count_kv", GgufValue((1 << 31) - 1, UINT32), r"describes a model of [\d,]+"),
        ("llama.attention.head_count_kv", GgufValue(-1, INT32), "cannot load|does not fit"),
        ("llama.attention.layer_norm_rms_epsilon", GgufValue(math.nan, FLOAT32), "is nan, which no model has"),
        ("llama.attention.layer_norm_rms_epsilon", GgufValue(1e308, FLOAT64), r"is 1e\+308, which no model has"),
        ("llama.attention.key_length", GgufValue(3, UINT32), "does not fit its tensors"),
        ("llama.attention.key_length", GgufValue("x", STRING), "cannot load"),
        ("llama.rope.scaling.type", GgufValue("linear", STRING), r"cannot load .*rope\.scaling\.factor"),
        ("llama.rope.freq_base", GgufValue(True, BOOL), ""),
        ("llama.expert_count", GgufValue(8, UINT32), "has 0 experts, and 8 in its metadata"),
        ("general.architecture", GgufValue("A" * 10_000, STRING), "is a A{40} model, which is not read"),
    ],
    "gemma3_text": [
        ("gemma3.attention.sliding_window_pattern", GgufValue([1, 0], ARRAY, UINT32), "cannot load"),
        ("gemma3.rope.freq_base_swa", GgufValue(math.inf, FLOAT32), "is inf, which no model has"),
    ],
    "mixtral": [("llama.expert_count", GgufValue(1 << 20, UINT32), "has 6 experts, and 1048576 in its metadata")],
    "phi3": [("phi3.rope.dimension_count", None, r"cannot load .*rope\.dimension_count")],
}


@pytest.mark.gate
@pytest.mark.parametrize("family", METADATA)
def test_metadata_that_no_model_has_is_one_error_without_a_large_allocation(family, tmp_path):
    source = gguf_families.save(tmp_path / "model", family, num_hidden_layers=1)
    file = read_gguf(write_gguf(source, tmp_path / "good.gguf").path)
    path = tmp_path / "changed.gguf"
    tracemalloc.start()
    for name, value, match in METADATA[family]:
        path.write_bytes(changed(file, {name: value}))
        if match:
            with pytest.raises(BillhookError, match=match) as error:
                resolve(path)
            assert len(str(error.value)) < 500 + 2 * len(str(path)), error.value
            assert "\n" not in str(error.value)
        else:
            resolve(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def test_factors_of_another_width_than_the_metadata_say_are_refused_before_any_are_computed(tmp_path):
    source = gguf_families.save(tmp_path / "model", "llama:llama3", num_hidden_layers=1)
    file, path = read_gguf(write_gguf(source, tmp_path / "good.gguf").path), tmp_path / "changed.gguf"
    path.write_bytes(changed(file, {"llama.attention.key_length": GgufValue(1 << 20, UINT32)}))
    with LiveMemory([]) as memory, pytest.raises(BillhookError, match="scales its rotary embedding in a way"):
        resolve(path)
    assert memory.peak < 1 << 16


def test_the_file_that_is_read_is_not_replaced(tmp_path):
    """The directory that a GGUF file is in is no output, though it has a config.json and may be overwritten."""
    tiny.save(tmp_path / "small", tiny.llama(num_hidden_layers=1))
    (tmp_path / "small" / "model.safetensors").unlink()
    file = write_gguf(gguf_families.save(tmp_path / "model", "llama"), tmp_path / "small" / "model.gguf").path
    for given in (file, file.parent):
        for attempt in (
            lambda model: quantize(model, "q8_0", tmp_path / "small", quantizer="round", overwrite=True),
            lambda model: export_dense(model, tmp_path / "small", overwrite=True),
        ):
            with pytest.raises(BillhookError, match="contains the source model"):
                attempt(given)
    assert file.is_file()


def test_an_unknown_architecture_and_a_file_without_sizes_are_refused(tmp_path):
    import gguf

    for arch, message in [
        ("granite", "is a granite model, which is not read from GGUF files"),
        ("llama", "has no hidden_size in its metadata"),
    ]:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", arch)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(BillhookError, match=message):
            resolve(tmp_path / "x.gguf")
    with pytest.raises(BillhookError, match=r"Cannot read .*nowhere\.gguf: No such file"):
        resolve(tmp_path / "nowhere.gguf")
