"""Tokens, scores and types in GGUF files, for tokenizers whose rules are written out here."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from paths import DEMO

from billhook.errors import BillhookError
from billhook.export.gguf_tokenizer import add_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def written(source: Path, size: int, arch: str = "llama") -> tuple[dict[str, Any], list[str]]:
    """The metadata of a tokenizer, without its prefix, and the notes."""
    writer = gguf.GGUFWriter(None, arch)
    notes = add_tokenizer(writer, source, {"vocab_size": size})
    found = {key.removeprefix("tokenizer.ggml."): field.value for key, field in writer.kv_data[0].items()}
    return found, notes


def varint(number: int) -> bytes:
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def piece(text: str, score: float, kind: int | None) -> bytes:
    """A token of tokenizer.model."""
    body = b"\x0a" + varint(len(text.encode())) + text.encode() + b"\x15" + struct.pack("<f", score)
    body += b"" if kind is None else b"\x18" + varint(kind)
    return b"\x0a" + varint(len(body)) + body


def added(number: int, text: str, special: bool) -> dict[str, Any]:
    return {"id": number, "content": text, "special": special, "normalized": False, "lstrip": False, "rstrip": False}


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Path:
    tokens = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("▁the", -1.5, None), ("x" * 200, -2.5, USER)]
    tokens += [("<0x0A>", 0.0, BYTE)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(piece(*token) for token in tokens) + b"\x12\x02ab")
    own = {5: added(5, "<|end|>", False), 6: added(6, "my▁word", False), 9: added(9, "beyond", True)}
    own |= {1: added(1, "<s>", True)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": own, "add_prefix_space": True}))
    return tmp_path


def test_a_sentencepiece_model_keeps_texts_scores_and_types(sentencepiece):
    found, notes = written(sentencepiece, 8)
    assert notes == []
    assert (found["model"], found["pre"]) == ("llama", "default")
    texts = [text.encode() for text in ("<unk>", "<s>", "▁the", "x" * 200, "<0x0A>", "<|end|>", "my word", "[PAD7]")]
    assert found["tokens"] == texts
    assert found["scores"] == [0.0, -1000.0, -1.5, -2.5, 0.0, -1000.0, -1000.0, -10000.0]
    assert found["token_type"] == [UNKNOWN, CONTROL, NORMAL, NORMAL, BYTE, CONTROL, USER, UNUSED]
    assert found["add_space_prefix"] is True
    assert len(written(sentencepiece, 3)[0]["tokens"]) == 3


@pytest.mark.parametrize(("arch", "prefix"), [("gemma2", False), ("gemma3", False), ("qwen2", None), ("llama", True)])
def test_a_space_is_put_before_a_text_where_the_tokenizer_does(sentencepiece, arch, prefix):
    assert written(sentencepiece, 8, arch)[0].get("add_space_prefix") == prefix


@pytest.mark.parametrize("cut", [1, 3, 9, 200])
def test_a_damaged_sentencepiece_model_is_an_error(sentencepiece, cut):
    data = (sentencepiece / "tokenizer.model").read_bytes()
    (sentencepiece / "tokenizer.model").write_bytes(data[:-2][:-cut])
    with pytest.raises(ValueError, match="ends too early"):
        written(sentencepiece, 8)


def from_merges(folder: Path, **changes: Any) -> Path:
    vocab = ["<unk>", "<0x00>", "▁", "a", "b", "ab", "▁ab", "aa"]
    facts: dict[str, Any] = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
        "pre_tokenizer": None,
        "model": {"type": "BPE", "vocab": dict(zip(vocab, range(8), strict=True))},
        "added_tokens": [added(0, "<unk>", True), added(8, "<unused1>", False), added(9, "word", False)],
    }
    facts["model"]["merges"] = ["a b", ["▁", "ab"], "▁a b", "a a"]  # ▁ab is made in two ways
    (folder / "tokenizer.json").write_text(json.dumps(facts | changes))
    return folder


def test_scores_are_in_the_order_of_the_first_merges(tmp_path):
    found, _ = written(from_merges(tmp_path), 11)
    low = -1000.0
    assert found["scores"] == [low, low, low, low, low, 0.0, -1.0, -3.0, low, low, -10000.0]
    kinds = [CONTROL, BYTE, *[NORMAL] * 6, CONTROL, USER, UNUSED]
    assert found["token_type"] == kinds
    assert "add_space_prefix" not in found
    spaces = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    assert written(from_merges(tmp_path, normalizer=spaces), 11)[0]["add_space_prefix"] is False


def test_a_tokenizer_that_llama_cpp_cannot_use_is_left_out_with_a_note(tmp_path):
    found, (note,) = written(tmp_path, 11)
    assert (found["model"], found["llama.vocab_size"]) == ("none", 11)
    assert "has no tokenizer: with this file llama.cpp can read and write only token numbers" in note
    model = {"type": "BPE", "vocab": {"▁": 0, "a": 1}, "merges": []}
    _, (note,) = written(from_merges(tmp_path, model=model), 11)
    assert "has no tokens for single bytes" in note
    with pytest.raises(BillhookError, match="is a Unigram model, which is not known to llama"):
        written(from_merges(tmp_path, model={"type": "Unigram", "vocab": []}), 11)


def byte_level(folder: Path, **changes: Any) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    facts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    facts["model"] |= changes.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(facts | changes), encoding="utf-8")
    return folder


def test_a_byte_level_tokenizer_keeps_its_vocabulary_in_order(tmp_path):
    facts = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    found, _ = written(byte_level(tmp_path), 4098)
    spelled = sorted(facts["model"]["vocab"], key=facts["model"]["vocab"].__getitem__)
    assert found["tokens"] == [*spelled, "[PAD4096]", "[PAD4097]"]
    assert found["token_type"] == [CONTROL, *[NORMAL] * 4095, UNUSED, UNUSED]
    assert (found["model"], found["pre"], len(found["merges"])) == ("gpt2", "gpt-2", len(facts["model"]["merges"]))
    with pytest.raises(BillhookError, match="has a token 4095 where its model knows 4000 tokens"):
        written(tmp_path, 4000)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, Any]:
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [rule, bytes_]}}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (split(LLAMA3), "dbrx"),
        (split(LLAMA3) | {"model": {"ignore_merges": True}}, "llama-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
        (split(LLAMA3.replace("{1,3}", "")) | {"model": {"ignore_merges": True}}, "qwen2"),
    ],
)
def test_a_pre_tokenizer_is_known_by_its_rules(tmp_path, changes, name):
    assert written(byte_level(tmp_path, **changes), 4096)[0]["pre"] == name


def test_models_of_49152_tokens_are_read_without_bos(tmp_path):
    assert written(byte_level(tmp_path), 49152)[0]["add_bos_token"] is False
    assert "add_bos_token" not in written(tmp_path, 49153)[0]
