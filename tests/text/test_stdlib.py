"""The standard library as text, and the demo model that was trained on it."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from billhook.errors import BillhookError
from billhook.text.stdlib import HELD_OUT, documents

LIMIT_BYTES = 12_000_000


@pytest.fixture(scope="module")
def train() -> list[tuple[str, str]]:
    return documents("train")


@pytest.fixture(scope="module")
def held_out() -> list[tuple[str, str]]:
    return documents("heldout")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def _module(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def test_every_held_out_module_exists(held_out):
    assert {_module(path) for path, _ in held_out} == set(HELD_OUT)


@pytest.mark.gate
def test_no_text_is_in_both_splits(train, held_out):
    everything = documents("train", include_tests=True)
    assert not {_module(path).removeprefix("_") for path, _ in everything} & set(HELD_OUT)
    assert not {path for path, _ in everything} & {path for path, _ in held_out}
    assert not {text for _, text in everything} & {text for _, text in held_out}
    assert {path for path, _ in train} <= {path for path, _ in everything}


def test_both_splits_have_the_documented_size(train, held_out):
    sizes = [sum(len(text) for _, text in split) for split in (train, held_out)]
    assert 0.05 < sizes[1] / sum(sizes) < 0.15


def test_order_is_deterministic_and_paths_are_unique(train):
    paths = [path.split("/") for path, _ in train]
    assert train == documents("train")
    assert paths == sorted(paths)
    assert len({path for path, _ in train}) == len(train)


def test_calibration_text_has_no_tests(train):
    assert not [path for path, _ in train if path.startswith("test/") or "/tests/" in path]


def _write_library(root: Path, *extra: str) -> None:
    for name in ("os.py", "argparse.py", "json/__init__.py", *extra):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n", encoding="utf-8")


def test_tests_of_held_out_modules_are_nobodys_text(tmp_path):
    tests = ("test/test_os.py", "test/test_csv.py", "test/test_json/test_dump.py", "test/test_shutil_extra.py")
    _write_library(tmp_path, *tests, "_csv.py", "site-packages/thing.py", "json/tests/test_x.py")
    assert [path for path, _ in documents("train", include_tests=True, root=tmp_path)] == ["os.py", "test/test_os.py"]
    assert [path for path, _ in documents("train", root=tmp_path)] == ["os.py"]
    assert [path for path, _ in documents("heldout", root=tmp_path)] == ["argparse.py", "json/__init__.py"]


def test_undecodable_files_are_skipped(tmp_path):
    _write_library(tmp_path)
    (tmp_path / "broken.py").write_bytes(b"# \xff\xfe\n")
    (tmp_path / "unknown.py").write_bytes(b"# -*- coding: no-such -*-\n")
    assert [path for path, _ in documents("train", root=tmp_path)] == ["os.py"]


def test_an_interpreter_without_sources_is_refused(tmp_path):
    with pytest.raises(BillhookError, match="no standard library sources"):
        documents("train", root=tmp_path)


@pytest.mark.parametrize(("split", "include_tests"), [("valid", False), ("heldout", True)])
def test_bad_requests_are_refused(split, include_tests):
    with pytest.raises(BillhookError):
        documents(split, include_tests=include_tests)


@given(text=st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
@settings(deadline=None)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_gives_source_text_back(tokenizer, held_out):
    for _, text in held_out[:5]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_demo_model_is_small_and_complete():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < LIMIT_BYTES
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training.json"} <= {
        path.name for path in DEMO.iterdir()
    }


@pytest.mark.gate
def test_demo_model_knows_more_than_word_frequencies(tokenizer, held_out):
    model, report = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_hidden_layers >= 12
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    ids = torch.tensor(tokenizer("".join(text for _, text in held_out)[:20_000])["input_ids"])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    frequencies = torch.bincount(ids) / len(ids)
    # The entropy of this very text's own frequencies: no unigram model can do better on it.
    unigram = -(frequencies * frequencies.clamp(min=1e-12).log()).sum().item()
    assert math.isfinite(loss)
    assert loss < 0.6 * unigram
