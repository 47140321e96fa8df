"""GGUF files against the real llama.cpp: equal to those of its converter, and the same loss and the same tokens.

Where llama.cpp is at hand (see CONTRIBUTING.md). Real tokenizers are tried on the folders that BILLHOOK_REAL_MODELS
names, separated by colons.
"""

import json
import os
from pathlib import Path

import gguf_families
import pytest
import tiny
import torch
from llamacpp import LlamaCpp, differences, llama_cpp  # noqa: F401
from paths import DEMO, ROOT
from transformers import AutoConfig, AutoTokenizer

from billhook import quantize
from billhook.architectures.layers import find_layers
from billhook.export.gguf import write_gguf
from billhook.plan.plan import Budget, Plan
from billhook.plan.spec import Spec
from billhook.steps.export import export_gguf, export_tensor_types
from billhook.store.gguf_file import read_gguf
from billhook.tasks.opening import load_model

pytestmark = pytest.mark.nightly
SENTENCEPIECE = ("gemma2", "phi3", "phi3:longrope")  # the converter insists on a tokenizer.model
TEXTS = [
    "Hello world",
    "  two  spaces",
    "naïve façades cost 12 € each.\n\n",
    "日本語 テスト 12345",
    "🦙🚀 \t x",
    "def f(x):\n    return x**2  # it's\n",
    "don't I'LL Once upon a time",
]


@pytest.mark.parametrize("name", gguf_families.CONFIGS)
def test_a_family_is_equal_to_the_converters_file_and_has_the_loss_of_torch(name, llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    model = gguf_families.save(tmp_path / "model", name)
    if name in SENTENCEPIECE:
        add_sentencepiece(model, llama_cpp)
    ours = write_gguf(model, tmp_path / "ours.gguf", rest="f32")
    assert differences(read_gguf(ours.path), llama_cpp.convert(model, tmp_path / "theirs.gguf", "f32")) == {}
    assert ours.notes == []
    ids, loss = gguf_families.losses(gguf_families.build(name))
    assert llama_cpp.loss(ours.path, ids.numpy()) == pytest.approx(loss, abs=0.002)


def test_a_file_in_parts_has_the_same_loss(llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    model = gguf_families.save(tmp_path / "model", "llama")
    parts = write_gguf(model, tmp_path / "model.gguf", rest="f32", split=200_000).parts
    assert len(parts) > 4
    ids, loss = gguf_families.losses(gguf_families.build("llama"))
    assert llama_cpp.loss(parts[0], ids.numpy()) == pytest.approx(loss, abs=0.002)


def test_a_template_carries_a_quantized_model_of_an_architecture_that_is_not_known(llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    model = gguf_families.save(tmp_path / "model", "granite")
    llama_cpp.convert(model, tmp_path / "template.gguf", "f32")
    fields = {"template": tmp_path / "template.gguf", "quantizer": "round", "embeddings": "q8_0"}
    output = quantize(model, "q8_0", tmp_path / "out", **fields).output
    ids, loss = gguf_families.losses(gguf_families.build("granite"))
    assert llama_cpp.loss(output / "out.gguf", ids.numpy()) == pytest.approx(loss, abs=0.01)


@pytest.mark.parametrize("kind", ["auto", "f16", "bf16", "q8_0"])
def test_every_type_is_equal_to_the_converters(kind, llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    model = gguf_families.save(tmp_path / "model", "llama", torch.bfloat16)
    ours = write_gguf(model, tmp_path / "ours.gguf", rest=kind)
    assert differences(read_gguf(ours.path), llama_cpp.convert(model, tmp_path / "theirs.gguf", kind)) == {}


@pytest.mark.parametrize("kind", ["q2_0", "mxfp4"])
def test_types_for_widths_that_256_does_not_divide_are_computed_by_llama_cpp(kind, llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    model = gguf_families.save(tmp_path / "model", "llama")
    file = quantize(model, kind, tmp_path / "out", quantizer="round").output / "out.gguf"
    assert {e.type for e in read_gguf(file).tensors.values() if "ffn_up" in e.name} == {kind}
    ids, loss = gguf_families.losses(load_model(file, dtype="float32"))
    assert llama_cpp.loss(file, ids.numpy()) == pytest.approx(loss, abs=0.02)
    assert abs(loss - gguf_families.losses(gguf_families.build("llama"))[1]) > 0.02  # the type is felt


def test_windows_in_other_layers_than_usual_are_known_to_llama_cpp(llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6}
    model = gguf_families.save(tmp_path / "model", "gemma3_text", **kinds)
    written = write_gguf(model, tmp_path / "model.gguf", rest="f32")
    ids, loss = gguf_families.losses(gguf_families.build("gemma3_text", **kinds))
    assert llama_cpp.loss(written.path, ids.numpy()) == pytest.approx(loss, abs=0.002)


def add_sentencepiece(model: Path, llama: LlamaCpp) -> None:
    """Give a model a tokenizer.model, and tokens that were added to it or have another type than there."""
    (model / "tokenizer.json").unlink()
    llama.train_sentencepiece(ROOT / "docs" / "concepts.md", model / "tokenizer")
    listed = {0: ("<unk>", True), 1: ("<s>", True), 2: ("</s>", True), 701: ("<|user|>", False), 702: ("▁▁x", False)}
    added = {str(number): {"content": text, "special": special} for number, (text, special) in listed.items()}
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    settings |= {"added_tokens_decoder": added, "chat_template": "{{ messages }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (model / "added_tokens.json").write_text(json.dumps({"<more>": 703}), encoding="utf-8")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "phi3", "qwen2"])
def test_a_sentencepiece_tokenizer_is_equal_to_the_converters(name, llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    model = gguf_families.save(tmp_path / "model", name, torch.bfloat16)
    add_sentencepiece(model, llama_cpp)
    ours = write_gguf(model, tmp_path / "ours.gguf")
    assert differences(read_gguf(ours.path), llama_cpp.convert(model, tmp_path / "theirs.gguf")) == {}


def real_models() -> list[Path]:
    """The bundled model, trained ones beside the repository, and those of BILLHOOK_REAL_MODELS."""
    beside = ROOT.parent / "shared" / "models"
    own = [Path(folder) for folder in os.environ.get("BILLHOOK_REAL_MODELS", "").split(":") if folder]
    return [DEMO, *(path.parent for path in sorted(beside.glob("*/config.json"))), *own]


@pytest.mark.parametrize("model", real_models(), ids=lambda path: path.name)
def test_a_trained_model_has_the_same_tensors_tokens_and_loss(model, llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    ours = write_gguf(model, tmp_path / "ours.gguf")
    theirs = llama_cpp.convert(model, tmp_path / "theirs.gguf")
    different = differences(read_gguf(ours.path), theirs)
    assert all(key.startswith("tokenizer.ggml.") for key in different), different
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not ours.notes:
        assert llama_cpp.tokens(ours.path, TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]
    rows = min(AutoConfig.from_pretrained(model).max_position_embeddings, 256)
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer(text)["input_ids"][:rows]])
    dense = load_model(model, dtype="float32")
    with torch.no_grad():
        loss = dense(input_ids=ids, labels=ids).loss.item()
    written = write_gguf(model, tmp_path / "f32.gguf", rest="f32")
    assert llama_cpp.loss(written.path, ids.numpy()) == pytest.approx(loss, abs=0.002)


def test_llama_quantize_gives_every_tensor_the_type_of_an_exported_list(llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    types = ["q4_0", "q5_1", "iq4_nl", "q8_0", "q5_0"]
    model = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=12, tie_word_embeddings=False))
    names = [layer.name for layer in find_layers(tiny.llama(num_hidden_layers=12))]
    weights = {name: Spec(type=types[i % len(types)]) for i, name in enumerate(names)}
    plan = Plan(Budget("bytes", 1), weights)
    ours = quantize(model, "", tmp_path / "out", plan=plan, embeddings="q4_1", quantizer="round").output / "out.gguf"
    listed = export_tensor_types(ours.parent, tmp_path / "types.txt").path
    export_gguf(model, tmp_path / "f16.gguf", kind="f16")
    theirs = llama_cpp.quantize(tmp_path / "f16.gguf", tmp_path / "theirs.gguf", listed, "Q8_0")
    made, wanted = ({x.name: x.type for x in file.tensors.values()} for file in (theirs, read_gguf(ours)))
    assert made == wanted
