"""Calibration data given from Python: every form gives the windows of the same text in a file, and wrong rows are
named."""

import re

import numpy as np
import pytest
import tiny
import torch
from documents import jsonl, texts

from billhook import BillhookError, prune
from billhook.comparison.grid import Grid, compare
from billhook.text.windows import load_calibration

TEXTS = texts(40)
IDS = torch.arange(96).view(6, 16)
ARRAY = IDS.numpy()
READ_ONLY = np.frombuffer(ARRAY.astype(np.uint16).tobytes(), np.uint16).reshape(6, 16)
FORMS = {
    "list": TEXTS,
    "tuple": tuple(TEXTS),
    "rows": [{"text": text, "id": number} for number, text in enumerate(TEXTS)],
    "nulls": [None, *TEXTS[:3], None, {"text": None}, *TEXTS[3:]],
    "nulls of a table": [float("nan"), *TEXTS],
    "array": np.array(TEXTS),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def expected(tokenizer, tmp_path_factory):
    source = jsonl(tmp_path_factory.mktemp("texts") / "a.jsonl", TEXTS)
    return {
        sampling: load_calibration(source, tokenizer, samples=8, length=32, sampling=sampling).digest
        for sampling in ("packed", "papers")
    }


@pytest.mark.parametrize("sampling", ["packed", "papers"])
@pytest.mark.parametrize("form", FORMS)
def test_texts_from_python_give_the_windows_of_a_file(tokenizer, expected, form, sampling):
    found = load_calibration(FORMS[form], tokenizer, samples=8, length=32, sampling=sampling)
    assert found.digest == expected[sampling]
    assert (found.source, found.bos) == ("given as texts", sampling == "packed")


@pytest.mark.gate
@pytest.mark.parametrize("sampling", ["packed", "papers"])
def test_data_sets_give_the_windows_of_a_file(tokenizer, expected, sampling, caplog):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": text} for text in [*TEXTS, None, "left out"]])
    options = {"samples": 8, "length": 32, "sampling": sampling}
    assert load_calibration(rows.select(range(41)), tokenizer, **options).digest == expected[sampling]
    assert "null: 1." in caplog.text
    with pytest.raises(BillhookError, match="found DatasetDict"):
        load_calibration(datasets.DatasetDict(train=rows), tokenizer, **options)
    with pytest.raises(BillhookError, match="row 1 has no field `text` or `messages`; it has words"):
        load_calibration(rows.rename_column("text", "words"), tokenizer, **options)
    streamed = load_calibration(rows.to_iterable_dataset(), tokenizer, **options)
    assert streamed.ids.shape == (8, 32)


def test_an_iterator_is_read_as_far_as_needed(tokenizer):
    def endless():
        number = 0
        while True:
            seen.append(number)
            yield f"document {number} " * 20
            number += 1

    seen: list[int] = []
    assert load_calibration(endless(), tokenizer, samples=2, length=32).ids.shape == (2, 32)
    assert len(seen) < 200


@pytest.mark.parametrize(
    "data",
    [
        IDS,
        list(IDS),
        [IDS[:2], IDS[2:].int()],
        iter(IDS.split(3)),
        [{"input_ids": row.tolist(), "attention_mask": [1] * 16} for row in IDS],
        [{"input_ids": row.tolist(), "attention_mask": None} for row in IDS],
        [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(2)],
        ARRAY,
        READ_ONLY,
        list(ARRAY.astype(np.int32)),
        iter(np.split(READ_ONLY, 3)),
        [{"input_ids": row, "attention_mask": np.ones(16)} for row in READ_ONLY],
        ARRAY.tolist(),
        [tuple(row) for row in ARRAY],
        [ARRAY[:2].tolist(), ARRAY[2:].tolist()],
        [ARRAY[0].tolist(), ARRAY[1], IDS[2:]],
    ],
    ids=[
        *("tensor", "rows", "parts", "iterator", "tokenized", "unmasked", "batches"),
        *("array", "read-only array", "arrays", "iterator of arrays", "rows with arrays"),
        *("lists", "tuples", "lists of windows", "of several kinds"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_token_ids_from_python_are_used_as_they_are(data):
    found = load_calibration(data, None, samples=1, length=4)
    assert torch.equal(found.ids, IDS)
    assert (found.sampling, found.bos) == ("given", None)


class TableOf:
    """A stand-in for a data frame."""

    def __init__(self, columns):
        self._columns = columns

    @property
    def columns(self):
        return list(self._columns)

    def __getitem__(self, name):
        return self._columns[name]


@pytest.mark.parametrize("form", ["rows", "table", "dataset"])
def test_token_ids_come_before_the_chats_that_they_were_made_of(form):
    """As a dataset that was mapped by a tokenizer has them, which needs no tokenizer again."""
    chats = [[{"role": "user", "content": "x"}]] * len(IDS)
    columns = {"messages": chats, "input_ids": IDS.tolist(), "attention_mask": [[1] * 16] * len(IDS)}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if form == "dataset":
        data = pytest.importorskip("datasets").Dataset.from_list(rows)
    else:
        data = rows if form == "rows" else TableOf(columns)
    assert torch.equal(load_calibration(data, None, samples=1, length=4).ids, IDS)
    if form == "table":
        columns["attention_mask"] = [[0] * 16] * len(IDS)
        with pytest.raises(BillhookError, match="row 1 is padded"):
            load_calibration(data, None, samples=1, length=4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration is empty"),
        (iter(()), "calibration is empty"),
        (3, "calibration: found int"),
        (b"bytes", "calibration: found bytes"),
        ({"train": TEXTS}, "calibration: found dict"),
        (["a", 3], "row 2: the text is of type int, not a string"),
        (["a", {"text": 3}], "row 2: the text is of type int, not a string"),
        (["a", {"txt": "b"}], "row 2 has no field `text` or `messages`; it has txt"),
        (["a", IDS[0]], "row 2: found Tensor, not a text"),
        ([[]], "row 1: found list, not a text"),
        (["a", [1, 2, 3]], "row 2: found list, not a text"),
        (["a", ARRAY[0]], "row 2: found ndarray, not a text"),
        ([1, 2, 3], r"row 1: `tokens` must be \[samples, length\].*found int"),
        (ARRAY[0], r"calibration: `tokens` must be \[samples, length\].*found \[16\]"),
        (ARRAY.astype(float), "calibration: `tokens` must be whole numbers, found torch.float64"),
        (list(ARRAY > 3), "row 1: `tokens` must be whole numbers, found torch.bool"),
        ([ARRAY[0], ARRAY[1].astype(np.float32)], "row 2: `tokens` must be whole numbers, found torch.float32"),
        ([{"input_ids": ARRAY[0] / 2}], "row 1: `tokens` must be whole numbers, found torch.float64"),
        ([[1, 2], [1, 2.5]], "row 2: `tokens` must be whole numbers, found torch.float32"),
        ([[1.0, 2.0]], "row 1: `tokens` must be whole numbers, found torch.float32"),
        ([[1, 2], [1, "a"]], "row 2: `tokens` must be a list of whole numbers, an array or a tensor"),
        ([[1, 2], [1, 2**70]], "row 2: `tokens` must be a list of whole numbers, an array or a tensor"),
        ([[[1, 2], [3]]], "row 1: `tokens` must be a list of whole numbers, an array or a tensor"),
        ([IDS[0], "a"], r"row 2: `tokens` must be \[samples, length\].*found str"),
        ([IDS[0], IDS[0, :5]], "row 2 has 5 tokens, the first row 16: give windows of one length"),
        ([IDS[0], IDS[0].float()], "row 2: `tokens` must be whole numbers, found torch.float32"),
        ([IDS[0], {"text": "a"}], r"row 2: `tokens` must be \[samples, length\].*found NoneType"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], "row 1 is padded"),
        ([{"input_ids": ["a", "b"]}], "row 1: `input_ids` must be a list of whole numbers"),
        ([{"input_ids": [1, 2], "attention_mask": ["a", "b"]}], "row 1: `attention_mask` must be"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tokenizer, data, message):
    with pytest.raises(BillhookError, match=message):
        load_calibration(data, tokenizer, samples=1, length=4)


@pytest.mark.gate
@pytest.mark.parametrize(
    "data",
    [[f"{number} {tiny.TEXT}" for number in range(40)], pytest.param(list(ARRAY), marks=pytest.mark.nightly)],
    ids=["texts", "ids"],
)
def test_a_run_takes_data_from_python(tmp_path, data):
    source = tiny.save(tmp_path / "model")
    report = prune(source, sparsity=0.5, calibration=data, samples=6, length=16, output=tmp_path / "out")
    assert report.sparsity == 0.5
    made_by = report.record["steps"][0]["made_by"]
    kind = "texts" if isinstance(data[0], str) else "a tensor"
    assert made_by["calibration"]["source"] == f"given as {kind}"


def test_seeds_need_data_that_can_be_read_again(tmp_path):
    for data, message in (
        *((ids, "given tokens are always the same") for ids in (IDS, ARRAY, list(IDS))),
        (iter(TEXTS), "give a list"),
    ):
        with pytest.raises(BillhookError, match=re.escape(message)):
            compare(tiny.llama(), Grid(seeds=2), "text.txt", calibration=data)
