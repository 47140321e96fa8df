"""Files of every form give the same documents, and what cannot be read says what it is."""

import csv
import gc
import gzip
import json
from pathlib import Path

import pytest
import tiny
from documents import texts

from billhook.errors import BillhookError
from billhook.text.corpus import documents
from billhook.text.windows import load_windows

TEXTS = ["plain", 'with "quotes", commas\nand lines', "naïve façade 12 €", "  spaces  ", *texts(5)[1:]]

# `datasets` (5.2) opens a csv file to stream it and leaves closing it to the collector of garbage
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*\.csv:ResourceWarning")


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield tmp_path
    if "csv" in request.node.name.lower():
        gc.collect()  # here, and not in a later test


def write(path: Path, rows: list[str | None], mark: bytes = b"") -> Path:
    """Rows in the form of a suffix, after a byte order mark if there is one."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    items = [{"text": row, "id": number} for number, row in enumerate(rows)]
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_list(items).to_parquet(path)
        return path
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("text", "id"))
            writer.writeheader()
            writer.writerows(items)
        data = path.read_bytes()
    else:
        lines = json.dumps(items, indent=1) if kind == "json" else "".join(json.dumps(item) + "\n" for item in items)
        data = lines.encode()
    path.write_bytes(gzip.compress(mark + data) if path.suffix.lower() == ".gz" else mark + data)
    return path


NAMES = (
    "a.jsonl",
    "a.json",
    "a.csv",
    "a.parquet",
    "a.jsonl.gz",
    "a.json.gz",
    "a.csv.gz",
    "A.JSONL",
    "A.CSV",
    "a.JSON.GZ",
)


@pytest.mark.gate
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_form_are_the_same_documents(folder, name, stream):
    source = str(write(folder / name, [*TEXTS, None]))
    assert list(documents(source, "calibration", stream)) == TEXTS
    assert list(documents(source, "evaluation", stream)) == TEXTS


@pytest.mark.gate
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(folder, name):
    assert list(documents(str(write(folder / name, TEXTS, b"\xef\xbb\xbf")), "evaluation", True)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "a.Txt.GZ"])
def test_a_text_file_is_one_document(tmp_path, name):
    data = "\ufeffone\r\ntwo\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert documents(str(tmp_path / name), "evaluation", False) == ["one\r\ntwo\n"]


def test_json_lines_are_read_whatever_the_suffix(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.json").write_text(lines)
    assert documents(str(tmp_path / "a.json"), "evaluation", False) == TEXTS


@pytest.mark.gate
def test_saved_data_sets_are_read_by_split(folder):
    datasets = pytest.importorskip("datasets")
    parts = {split: datasets.Dataset.from_dict({"text": [split, None, "more"]}) for split in ("train", "test", "extra")}
    datasets.DatasetDict(parts).save_to_disk(folder / "several")
    parts["extra"].save_to_disk(folder / "one")
    for source, purpose, first in (
        ("several", "calibration", "train"),
        ("several", "evaluation", "test"),
        ("hub:several::extra", "evaluation", "extra"),
        ("one", "evaluation", "extra"),
        ("hub:one", "calibration", "extra"),
    ):
        place = source.replace("several", str(folder / "several")).replace("one", str(folder / "one"))
        assert list(documents(place, purpose, False)) == [first, "more"]
    with pytest.raises(BillhookError, match=r"it has train, test, extra: name one, hub:.*::train"):
        documents(f"hub:{folder / 'several'}::gone", "calibration", False)


@pytest.mark.gate
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"words\nx\n", "no field `text` or `messages`; it has words"),
        ("a.csv", b"text\n1\n2\n", "row 1: the text is of type int"),
        ("a.csv", b"", "holds no text"),
        ("a.parquet", b"not a parquet file", "Cannot load"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2 has no field `text`"),
        ("a.json", b'[{"text": ', "is not valid json"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"a\.json has no field `text`"),
        ("a.json", b'{\n "data": [\n  {"text": "a"}\n ]\n}', r"a\.json has no field `text`"),
        ("a.txt.gz", b"not compressed", "not a complete gzip file"),
        ("a.txt.gz", gzip.compress(b"cut off " * 50, mtime=0)[:-9], "not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": 3}\n', mtime=0), "line 1: the text is of type int"),
        ("a.pdf", b"", "Unknown text source .*A file may also be .json, .csv, .parquet, or end in .gz"),
        ("a.csv.zip", b"", "Unknown text source"),
    ],
)
def test_files_that_cannot_be_read_say_why(folder, name, content, message):
    (folder / name).write_bytes(content)
    for stream in (False, True):
        with pytest.raises(BillhookError, match=message):
            list(documents(str(folder / name), "calibration", stream))


@pytest.mark.gate
def test_rows_that_cannot_be_parsed_far_inside_a_file_are_an_error(folder):
    (folder / "a.csv").write_text("text\n" + "good\n" * 100_000 + "a,b,c\n")
    with pytest.raises(BillhookError, match="Cannot load"):
        list(documents(str(folder / "a.csv"), "calibration", True))


def test_missing_files_and_other_directories_are_named(tmp_path):
    for name in ("gone.csv", "gone.parquet", "gone.json", "gone.txt.gz"):
        with pytest.raises(BillhookError, match=f"There is no file .*{name}"):
            documents(str(tmp_path / name), "calibration", False)
    with pytest.raises(BillhookError, match=r"is a directory, and not one that save_to_disk.*or hub:"):
        documents(str(tmp_path), "calibration", False)


def test_tables_need_the_package_datasets_and_text_does_not(tmp_path, monkeypatch):
    write(tmp_path / "a.csv", TEXTS)
    write(tmp_path / "a.json.gz", TEXTS)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert documents(str(tmp_path / "a.json.gz"), "calibration", False) == TEXTS
    with pytest.raises(BillhookError, match=r"pip install 'billhook\[data\]', or give a \.txt or \.jsonl file"):
        documents(str(tmp_path / "a.csv"), "calibration", False)


def test_a_compressed_text_gives_the_windows_of_the_text(tmp_path):
    source = tiny.text_file(tmp_path / "a.txt")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(source.read_bytes()))
    found = [load_windows(str(path), tiny.tokenizer(), length=32).digest for path in (source, tmp_path / "a.txt.gz")]
    assert found[0] == found[1]
