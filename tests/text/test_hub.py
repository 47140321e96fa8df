"""Datasets of the hub, here from directories that are laid out like them: the same tokens as their files, and clear
errors."""

import pytest
import tiny
from documents import jsonl, texts

from billhook.errors import BillhookError
from billhook.text.hub import parse
from billhook.text.windows import load_calibration, load_windows


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def test_hub_sources_have_one_spelling():
    calibration, evaluation = parse("hub:c4", "calibration"), parse("hub:c4", "evaluation")
    assert (calibration.name, calibration.config, calibration.files) == (
        "allenai/c4",
        None,
        {"train": "en/c4-train.00000-of-01024.json.gz"},
    )
    assert evaluation.files == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    wikitext = parse("hub:wikitext2", "evaluation")
    assert (wikitext.name, wikitext.config, wikitext.split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert parse("hub:wikitext2:validation", "evaluation").split == "validation"
    assert parse("hub:me/mine", "calibration") == parse("hub:me/mine::train", "evaluation")
    assert parse("hub:me/mine:small:dev", "calibration").config == "small"


@pytest.fixture
def local_dataset(tmp_path, monkeypatch):
    """A dataset directory, which `hub:` reads without a hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    jsonl(folder / "train.jsonl", texts(50))
    jsonl(folder / "test.jsonl", ["held out " * 30])
    return folder


@pytest.mark.gate
def test_hub_datasets_give_the_same_tokens_as_their_files(tokenizer, local_dataset):
    from_hub = load_calibration(f"hub:{local_dataset}", tokenizer, samples=6, length=64, sampling="papers")
    from_file = load_calibration(str(local_dataset / "train.jsonl"), tokenizer, samples=6, length=64, sampling="papers")
    assert from_hub.digest == from_file.digest
    assert load_calibration(f"hub:{local_dataset}", tokenizer, samples=6, length=64).ids.shape == (6, 64)
    windows = load_windows(f"hub:{local_dataset}", tokenizer, length=16)
    assert windows.digest == load_windows(str(local_dataset / "test.jsonl"), tokenizer, length=16).digest


@pytest.mark.parametrize(
    ("source", "place", "field", "between"),
    [
        ("hub:wikitext2", "Salesforce/wikitext/wikitext-2-raw-v1/test-0.parquet", "text", "\n\n"),
        ("hub:c4", "allenai/c4/en/c4-validation.00000-of-00008.json.gz", "text", " "),
        ("hub:ptb", "ptb-text-only/ptb_text_only/penn_treebank/test/0000.parquet", "sentence", " "),
    ],
)
def test_the_texts_of_the_papers_are_joined_as_published(
    source, place, field, between, tokenizer, tmp_path, monkeypatch
):
    """A directory that is named and laid out like the dataset stands in for the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    made = datasets.Dataset.from_dict({field: texts(20)})
    made.to_parquet(path) if path.suffix == ".parquet" else made.to_json(path, compression="gzip")
    if "wikitext" in source:
        card = (
            "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: test\n    path: "
            "wikitext-2-raw-v1/test-*\n---\n"
        )
        (tmp_path / "Salesforce/wikitext/README.md").write_text(card)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "joined.txt").write_bytes(between.join(texts(20)).encode())
    assert (
        load_windows(source, tokenizer, length=16).digest
        == load_windows("joined.txt", tokenizer, length=16, limit=256).digest
    )


def test_hub_datasets_that_cannot_be_read_are_refused(tokenizer, local_dataset):
    with pytest.raises(BillhookError, match=r"Cannot load hub:.*\(split dev\)"):
        load_calibration(f"hub:{local_dataset}::dev", tokenizer, length=8)
    (local_dataset / "train.jsonl").write_text('{"words": "a b c"}\n')
    (local_dataset / "test.jsonl").write_text('{"words": "a b c"}\n')
    with pytest.raises(BillhookError, match="no field `text` or `messages`; it has words"):
        load_calibration(f"hub:{local_dataset}", tokenizer, length=8)


def test_hub_datasets_need_their_package(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(BillhookError, match=r"needs the package `datasets`: pip install 'billhook\[data\]'"):
        load_calibration("hub:c4", tokenizer, length=8)
