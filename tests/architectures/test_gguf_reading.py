"""A GGUF file gives back the model that it was made of, and a hostile one is one error."""

import json
from pathlib import Path

import gguf_families
import numpy as np
import pytest
import tiny
import torch
from command import done
from paths import DEMO

from billhook.architectures.sources import resolve
from billhook.errors import BillhookError, JobError
from billhook.export.gguf import write_gguf
from billhook.store.checkpoint import load_tokenizer
from billhook.tasks.opening import load_model

FAMILIES = [
    pytest.param(name, marks=pytest.mark.gate if name in ("mixtral", "gemma2") else pytest.mark.nightly)
    for name in gguf_families.CONFIGS
]
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
    assert "model.gguf holds rounded weights" in pruned.err
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
