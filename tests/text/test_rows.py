"""Chats become the text that the chat template writes, from every kind of source, and what is no chat is named."""

import json

import numpy as np
import pytest
import tiny
from documents import jsonl, texts

from billhook.errors import BillhookError
from billhook.evaluation.items import load_items
from billhook.steps.prune_job import PruneRequest
from billhook.steps.request import check_text_given
from billhook.text.chat import chat_of
from billhook.text.corpus import documents
from billhook.text.given import given
from billhook.text.objects import objects, without_nulls
from billhook.text.windows import load_calibration, load_windows

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' ~ message.role) }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": f"{text} {number}?"}, {"role": "assistant", "content": f"{number}!"}]
    for number, text in enumerate(texts(40))
]
WRITTEN = ["".join(f"[{message['role']}] {message['content']}</s>" for message in chat) for chat in CHATS]
ROWS = [{"messages": chat} for chat in CHATS]


@pytest.fixture(scope="module")
def tokenizer():
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    return words


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The chats in files of every kind."""
    folder = tmp_path_factory.mktemp("chats")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(json.dumps(ROWS))
    for name, rows in (("hub", lines), ("text", "".join(json.dumps({"text": text}) + "\n" for text in WRITTEN))):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text(rows)
    found = {"jsonl": f"{folder}/a.jsonl", "json": f"{folder}/a.json", "hub": f"hub:{folder}/hub::train"}
    found |= {"text": jsonl(folder / "text.jsonl", WRITTEN), "hub text": f"hub:{folder}/text::train"}
    return {**found, "list": ROWS}


@pytest.mark.parametrize("form", ["jsonl", "json", "hub", "list"])
@pytest.mark.parametrize("sampling", ["packed", "papers"])
def test_chats_give_the_windows_of_the_text_that_the_template_writes(tokenizer, sources, form, sampling):
    """With one BOS token where the template and the tokenizer both have one."""
    asked = {"samples": 8, "length": 32, "sampling": sampling}
    text = sources["hub text" if form == "hub" else "text"]  # a dataset of the hub is streamed in its order
    found = load_calibration(sources[form], tokenizer, **asked)
    assert found.digest == load_calibration(text, tokenizer, **asked).digest
    if isinstance(sources[form], str):
        windows = [load_windows(source, tokenizer, length=32) for source in (sources[form], text)]
        assert windows[0].digest == windows[1].digest


@pytest.mark.gate
def test_tables_and_data_sets_of_chats(tokenizer, sources, tmp_path, monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_list([{"messages": None}, *ROWS])
    rows.to_parquet(tmp_path / "a.parquet")
    for data in (rows, rows.to_iterable_dataset(), str(tmp_path / "a.parquet")):
        found = load_calibration(data, tokenizer, samples=8, length=32, sampling="papers")
        expected = load_calibration(sources["text"], tokenizer, samples=8, length=32, sampling="papers")
        assert found.digest == expected.digest
    assert "null: 1." in caplog.text
    wrong = datasets.Dataset.from_list([{"messages": None}, *ROWS, {"messages": []}])
    with pytest.raises(BillhookError, match="row 42: `messages` must be a list"):
        load_calibration(wrong, tokenizer, samples=8, length=32)


def test_a_bos_token_that_only_the_template_writes_stays(sources):
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    words.backend_tokenizer.post_processor = None
    chat = chat_of(words)
    assert documents(sources["jsonl"], "evaluation", False, chat)[0] == "<s>" + WRITTEN[0]
    drawn = load_calibration(sources["jsonl"], words, samples=8, length=64).ids
    assert not ((drawn[:, 1:] == 256) & (drawn[:, :-1] == 256)).any()
    assert (drawn == 256).any()


def test_messages_without_null_fields_reach_the_template():
    """A table has a null for every field that only other messages have."""
    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.keys() | list | join(' ') }},{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [{"messages": [{"role": "user", "content": "a", "tool_calls": None}, call], "id": 1}]
    assert given(rows, chat_of(words)) == ["role content,role tool_calls,"]


def parts(*texts):
    """The content of a message as a list of parts, with a null as a table has it."""
    return [{"type": "text", "text": text, "image": None} for text in texts]


IN_PARTS = "{% for part in m.content %}{{ '<image>' if 'image' in part else part.text }}{% endfor %}"
CONTENTS = {  # how templates write contents
    "joined": "{{ m.role ~ m.content }}",
    "added": "{{ m.role + m.content }}",
    "trimmed": "{{ m.content | trim }}",
    "json": "{{ m.content if m.content is string else m.content | tojson }}",
    "parts": IN_PARTS,
    "either": "{% if m.content is string %}{{ m.content }}{% else %}" + IN_PARTS + "{% endif %}",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_as_texts_and_as_lists_are_written_by_every_template(name):
    """A template that is written for one form writes nothing of the other, or its form in Python or JSON."""
    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}" + CONTENTS[name] + "{% endfor %}"
    made = [{"role": "user", "content": 'it\'s "é"'}, {"role": "assistant", "content": "<b>"}]
    chats = [made, [{**m, "content": parts(m["content"])} for m in made], [{**made[0], "content": parts("it's")}]]
    whole, listed, alone = given([{"messages": chat} for chat in chats], chat_of(words))
    roles = ("user", "assistant") if name in ("joined", "added") else ("", "")
    assert whole == listed == f'{roles[0]}it\'s "é"{roles[1]}<b>'
    assert alone == roles[0] + "it's"  # without an answer, and without a generation prompt


def test_a_chat_whose_contents_the_template_does_not_write_is_named():
    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(BillhookError, match=r"row 1: .* refuses its messages \(it does not write their contents\)"):
        given([{"messages": CHATS[0]}], chat_of(words))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list like"),
        ("hello", "must be a list like"),
        ({"role": "user", "content": "a"}, "must be a list like"),
        ([{"from": "human", "value": "a"}], 'must be a list like \\[{"role": "user", "content": "..."}, ...\\]'),
        ([{"role": "user"}], "must be a list like"),
        ([{"role": "user", "content": None}], "must be a list like"),
        ([{"role": "user", "content": 3}], "must be a list like"),
        ([{"role": "user", "content": []}], "must be a list like"),
        ([{"role": "user", "content": ["a"]}], 'a content may be a list of {"type": "text", "text": "..."}, too'),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], "a content may be a list"),
        ([{"role": "robot", "content": "a"}], r"the chat template refuses its messages \(unknown role robot\)"),
    ],
)
def test_what_is_no_chat_is_named(tokenizer, tmp_path, messages, message):
    rows = [ROWS[0], {"messages": messages}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data, where in ((rows, "row 2"), (str(tmp_path / "a.jsonl"), "line 2")):
        with pytest.raises(BillhookError, match=f"{where}: .*{message}"):
            load_calibration(data, tokenizer, samples=1, length=4)


def test_chats_need_a_chat_template(sources):
    for form in ("jsonl", "hub", "list"):
        with pytest.raises(BillhookError, match=r"1 is a chat, and .* no chat template: add chat_template\.jinja"):
            load_calibration(sources[form], tiny.tokenizer(), samples=1, length=4)


def test_half_of_a_surrogate_pair_becomes_a_question_mark():
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    chats = [{"messages": [{"role": "user", "content": "a\udce9"}]}]
    assert given(["a\udce9", {"text": "\ud800"}]) == ["a?", "?"]
    assert given(chats, chat_of(words)) == ["[user] a?</s>"]


def test_lines_end_at_line_feeds_only_and_a_byte_order_mark_is_none_of_them(tmp_path):
    """JSON allows the separators U+2028 and U+0085 inside strings."""
    path, text = tmp_path / "a.jsonl", "a\u2028b\u0085c"
    path.write_text("\ufeff" + json.dumps({"text": text}, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert documents(str(path), "evaluation", False) == [text]
    assert [row.text("text") for row in objects(str(path), "evaluation", "rows")] == [text]
    item = {"requests": [[text, "\ud800"]], "gold": 0}
    path.write_text("\ufeff" + json.dumps(item).replace("\\u2028", "\u2028"), encoding="utf-8")
    assert load_items(path)[0].requests == ((text, "?"),)


def test_rows_with_a_null_are_skipped_and_counted(caplog):
    rows = objects(
        [{"input": "a", "target": "b"}, {"input": None, "target": "b"}, {"input": "a"}], "calibration", "rows"
    )
    assert without_nulls(rows, ("input", "target"), "here") == [rows[0], rows[2]]
    assert "null: 1." in caplog.text
    with pytest.raises(BillhookError, match="here is empty: in every row 'input' is null"):
        without_nulls(rows[1:2], ("input",), "here")


class Frame:
    """A table as pandas has it: iterating it gives the names of its columns."""

    def __init__(self, **columns):
        self.columns, self._columns = list(columns), columns

    def __iter__(self):
        return iter(self.columns)

    def __getitem__(self, name):
        return self._columns[name]


def test_tables_are_read_by_their_column(tokenizer):
    nan = float("nan")
    assert given(Frame(id=[1, 2, 3], text=["a", nan, "b"])) == ["a", "b"]
    assert given(["a", nan, "b"]) == ["a", "b"]
    assert given(Frame(messages=CHATS), chat_of(tokenizer)) == WRITTEN
    assert given(Frame(input_ids=[[1, 2], np.array([3, 4])])).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(BillhookError, match="no column `text`, `messages` or `input_ids`; it has words, id"):
        given(Frame(words=["a"], id=[1]))


def test_tables_of_pandas(tokenizer):
    pandas = pytest.importorskip("pandas")
    assert given(pandas.DataFrame({"id": [1, 2, 3], "text": ["a", None, "b"]})) == ["a", "b"]
    assert given(pandas.Series(["a", None, "b"], dtype="string")) == ["a", "b"]
    assert given(pandas.DataFrame({"messages": [np.array(chat) for chat in CHATS]}), chat_of(tokenizer)) == WRITTEN


def test_an_empty_name_is_said_to_be_empty():
    with pytest.raises(BillhookError, match="name of the text source is empty"):
        documents("", "evaluation", True)
    with pytest.raises(BillhookError, match="calibration gives is empty"):
        check_text_given(PruneRequest(model="m", calibration=""), True, "wanda")


@pytest.mark.gate
def test_of_two_fields_the_one_that_is_not_null_is_read(tmp_path, monkeypatch, caplog):
    """A union of rows of text and of chats, as concatenated data sets have it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"text": "a", "messages": None}, {"text": None, "messages": chat}, {"text": None, "messages": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")

    def write(messages):
        return messages[0]["content"]

    for name in ("a.jsonl", "a.parquet", "saved"):
        for stream in (False, True):
            assert list(documents(str(tmp_path / name), "calibration", stream, write)) == ["a", "hi"], name
    for data in (rows, table, table.to_iterable_dataset(), table.to_pandas(), table.data.table):
        assert list(given(data, write)) == ["a", "hi"]
    assert caplog.text.count("null: 1.") == 11


@pytest.mark.gate
def test_a_data_set_without_a_text_is_refused_by_its_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = datasets.Features({"text": datasets.Value("string")})
    for name, texts_ in (("none", []), ("null", [None, None])):
        table = datasets.Dataset.from_dict({"text": texts_}, features=kinds)
        table.to_parquet(tmp_path / f"{name}.parquet")
        table.save_to_disk(tmp_path / f"{name}_saved")
        datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / f"{name}_splits")
    (tmp_path / "none.csv").write_text("")
    (tmp_path / "header.csv").write_text("text\n")
    places = [str(path) for path in tmp_path.iterdir() if path.name != "cache"]
    for source in [*places, f"hub:{tmp_path / 'none_saved'}"]:
        for stream in (False, True):
            with pytest.raises(BillhookError, match=f"^{source} holds no text: give a source with something in it"):
                list(documents(source, "evaluation", stream))
