"""Sources, sampling and windows: the published draws, the documented cuts, and clear errors instead of endless
loops."""

import json
import random

import numpy as np
import pytest
import tiny
import torch
from documents import jsonl, texts
from safetensors.torch import save_file
from tokenizers import processors

from billhook.errors import BillhookError
from billhook.text import corpus
from billhook.text import sampling as text_sampling
from billhook.text.windows import _byte_ends, check_ids, digest, load_calibration, load_windows


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def published(documents: list[str], tokenizer, samples: int, length: int, seed: int) -> torch.Tensor:
    """The sampling loop that the published code of the Wanda family shares, written out again."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i], return_tensors="pt").input_ids
            if ids.shape[1] > length:
                break
        i = random.randint(0, ids.shape[1] - length - 1)
        rows.append(ids[0, i : i + length])
    return torch.stack(rows)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_papers_sampling_is_the_published_one(tokenizer, tmp_path, seed):
    documents = texts()
    found = load_calibration(
        jsonl(tmp_path / "a.jsonl", documents), tokenizer, samples=20, length=64, seed=seed, sampling="papers"
    )
    assert torch.equal(found.ids, published(documents, tokenizer, 20, 64, seed))
    assert found.sampling == "papers"


def test_papers_sampling_with_one_long_document_among_many_short_ones(tokenizer, tmp_path, monkeypatch):
    """The search for a document that is long enough happens once and does not disturb the draws."""
    monkeypatch.setattr(text_sampling, "_MISSES", 3)
    documents = ["short"] * 40 + ["x" * 100]
    found = load_calibration(jsonl(tmp_path / "a.jsonl", documents), tokenizer, samples=4, length=64, sampling="papers")
    assert torch.equal(found.ids, published(documents, tokenizer, 4, 64, 0))


def test_papers_sampling_without_a_long_document_ends_in_an_error(tokenizer, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ["ab", "abcde", ""])
    with pytest.raises(
        BillhookError,
        match=r"No document of .* longer than 64 tokens \(3 documents, the longest has 6\)",
    ):
        load_calibration(source, tokenizer, samples=1, length=64, sampling="papers")


def test_papers_sampling_draws_a_document_that_is_one_token_longer_than_the_window(tokenizer, tmp_path, monkeypatch):
    """It has one window, without its last token; the documents with one token less have none, however often drawn."""
    monkeypatch.setattr(text_sampling, "_MISSES", 3)
    documents = ["y" * 63] * 40 + ["z" * 64]  # and a start token each
    found = load_calibration(jsonl(tmp_path / "a.jsonl", documents), tokenizer, samples=3, length=64, sampling="papers")
    assert torch.equal(found.ids, published(documents, tokenizer, 3, 64, 0))
    assert tokenizer.decode(found.ids[0]) == "<s>" + "z" * 63


def test_papers_sampling_reads_only_the_documents_it_draws(tokenizer, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", ["y" * 100] * 5000)
    seen = []
    real = text_sampling._encode
    monkeypatch.setattr(
        text_sampling,
        "_encode",
        lambda tokenizer, batch, **options: seen.extend(batch) or real(tokenizer, batch, **options),
    )
    load_calibration(source, tokenizer, samples=8, length=64, sampling="papers")
    assert len(seen) <= 8


def test_packed_windows_come_from_the_text_without_replacement(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("".join(random.Random(0).choices("abcdefgh", k=4000)))
    found = load_calibration(str(tmp_path / "a.txt"), tokenizer, samples=40, length=64, bos="no")
    flat = [256, *tokenizer((tmp_path / "a.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]]
    cut = [tuple(flat[i : i + 64]) for i in range(0, len(flat) - 63, 64)]
    rows = [tuple(row) for row in found.ids.tolist()]
    assert found.ids.dtype == torch.int64
    assert found.ids.shape == (40, 64)
    assert found.sampling == "packed"
    assert len(set(rows)) == 40
    assert set(rows) <= set(cut)


def test_packed_documents_follow_each_other_after_a_start_token(tokenizer, tmp_path):
    documents = [letter * 10 for letter in "abcdefgh"]
    found = load_calibration(jsonl(tmp_path / "a.jsonl", documents), tokenizer, samples=1, length=88)
    assert (found.ids == 256).sum() == 8
    assert found.ids[0, ::11].tolist() == [256] * 8
    assert sorted(tokenizer.decode(found.ids[0]).split("<s>")[1:]) == documents


def test_calibration_repeats_with_its_seed_only(tokenizer, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts())
    for sampling in ("packed", "papers"):
        first, again, other = (
            load_calibration(source, tokenizer, samples=8, length=32, seed=seed, sampling=sampling).digest
            for seed in (3, 3, 4)
        )
        assert first == again != other


def test_too_short_a_text_says_how_short(tokenizer, tmp_path):
    source = str(tiny.text_file(tmp_path / "a.txt", copies=1))
    with pytest.raises(BillhookError, match=r"128 windows of 64 need 8192 tokens, it has 83 in 1 document\."):
        load_calibration(source, tokenizer, length=64)
    with pytest.raises(BillhookError, match=r"has 83 tokens, fewer than one window of 100"):
        load_windows(source, tokenizer, length=100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"ok \xff", r"not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not valid json"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no field `text`"),
        ("a.jsonl", b'"text"\n', "line 1 has no field `text`"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: the text is of type int, not a string"),
        ("a.safetensors", b"nothing", "is not a safetensors file"),
    ],
)
def test_files_of_the_wrong_kind_are_refused(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for load in (load_calibration, load_windows):
        with pytest.raises(BillhookError, match=message):
            load(str(tmp_path / name), tokenizer, length=8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no file missing.txt"),
        ("missing.safetensors", "no file missing.safetensors"),
        (".", "is a directory"),
        ("wikitext", r"Unknown text source 'wikitext'. The forms are: FILE.txt, FILE.jsonl"),
        ("stdlib:tests", "use stdlib:train or stdlib:heldout"),
        ("hub:", "the form is hub:NAME"),
        ("hub:a:b:c:d", "the form is hub:NAME"),
        ("hub:c4:test", "C4 has no split 'test': use hub:c4:train or hub:c4:validation"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tokenizer, source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BillhookError, match=message):
        load_calibration(source, tokenizer, length=8)


@pytest.mark.parametrize("options", [{"samples": 0}, {"length": 1}, {"sampling": "all"}])
def test_impossible_requests_are_refused(tokenizer, tmp_path, options):
    with pytest.raises(BillhookError, match=r"at least|Unknown sampling"):
        load_calibration(str(tiny.text_file(tmp_path / "a.txt")), tokenizer, **({"length": 8} | options))


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(BillhookError, match="no tokenizer to read"):
        load_calibration(str(tiny.text_file(tmp_path / "a.txt")), None, length=8)
    with pytest.raises(BillhookError, match=r"no tokenizer to read texts with: give token ids"):
        load_calibration(["a text"], None, length=8)


def test_a_text_in_the_place_of_a_sources_name_is_refused(tokenizer):
    for read in (load_calibration, load_windows):
        with pytest.raises(BillhookError, match=r"^'The quick brown fox.{0,40}\.\.\. is longer than a file's name"):
            read(tiny.TEXT.strip() * 10, tokenizer, length=8)


def test_token_files_are_used_as_they_are(tmp_path):
    ids = torch.arange(60, dtype=torch.int32).view(6, 10)
    save_file({"tokens": ids}, tmp_path / "t.safetensors")
    source = str(tmp_path / "t.safetensors")
    assert torch.equal(load_calibration(source, None).ids, ids.long())
    assert torch.equal(load_calibration(source, None, samples=2, length=5).ids, ids[:2, :5].long())
    windows = load_windows(source, None, length=2048)
    assert torch.equal(windows.ids, ids.long())
    assert windows.text_bytes is None
    assert windows.digest == digest(ids) == load_calibration(source, None).digest


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, "no tensor `tokens`; it has ids"),
        ({"tokens": torch.zeros(8, dtype=torch.int64)}, r"must be \[samples, length\]"),
        ({"tokens": torch.zeros(0, 8, dtype=torch.int64)}, r"must be \[samples, length\]"),
        ({"tokens": torch.zeros(2, 4)}, r"must be whole numbers, found torch.float32"),
        ({"tokens": torch.zeros(2, 4, dtype=torch.bool)}, r"must be whole numbers, found torch.bool"),
    ],
)
def test_token_files_that_cannot_be_used_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(BillhookError, match=message):
        load_calibration(str(tmp_path / "t.safetensors"), None)


@pytest.mark.parametrize("bad", [258, -1, 2**40])
def test_ids_outside_the_vocabulary_are_named(tmp_path, bad):
    ids = torch.zeros(4, 8, dtype=torch.int64)
    ids[2, 5] = bad
    save_file({"tokens": ids}, tmp_path / "t.safetensors")
    for load in (load_calibration, load_windows):
        with pytest.raises(
            BillhookError, match=rf"token id {bad} at row 2, position 5 is outside the vocabulary of 258 entries"
        ):
            load(str(tmp_path / "t.safetensors"), None, length=8, vocab_size=258)
    check_ids(ids.clamp(0, 257), 258, "x")


def test_windows_cut_the_whole_text_once(tokenizer, tmp_path):
    """One start token in front of everything, none between documents, and the tail that fills no window dropped."""
    documents = texts(30)
    windows = load_windows(jsonl(tmp_path / "a.jsonl", documents), tokenizer, length=50, bos="no")
    whole = tokenizer("\n\n".join(documents))["input_ids"]
    assert windows.tokens == len(whole)
    assert windows.ids.flatten().tolist() == whole[: len(whole) // 50 * 50]
    assert (windows.ids == 256).sum() == 1


def test_every_window_begins_with_bos_and_every_token_of_the_text_is_scored_once(tokenizer, tmp_path):
    documents = texts(30)
    source = jsonl(tmp_path / "a.jsonl", documents)
    text = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    for length in (2, 50, 64):
        windows = load_windows(source, tokenizer, length=length)
        assert windows.bos
        assert (windows.ids[:, 0] == 256).all()
        assert windows.ids[:, 1:].flatten().tolist() == text[: len(text) // (length - 1) * (length - 1)]
        assert windows.text_bytes == windows.ids[:, 1:].numel()  # one token a byte


def test_windows_follow_the_habit_of_the_tokenizer(tokenizer, tmp_path):
    """Without a BOS token of its own accord the windows are those of `no`, with it those of `yes`."""
    plain = tiny.tokenizer()
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    source = jsonl(tmp_path / "a.jsonl", texts())
    for load in (load_calibration, load_windows):
        found = {
            (name, bos): load(source, words, length=32, bos=bos, **({"samples": 8} if load is load_calibration else {}))
            for name, words in (("adds", tokenizer), ("plain", plain))
            for bos in ("auto", "yes", "no")
        }
        assert found["adds", "auto"].digest == found["adds", "yes"].digest == found["plain", "yes"].digest
        assert found["plain", "auto"].digest == found["plain", "no"].digest != found["plain", "yes"].digest
        assert {key: each.bos for key, each in found.items()} == {
            (name, bos): bos == "yes" or (bos, name) == ("auto", "adds") for name, bos in found
        }
    plain.bos_token = None
    assert load_windows(source, plain, length=32).digest == found["plain", "no"].digest
    with pytest.raises(BillhookError, match="no BOS token for windows to begin with"):
        load_windows(source, plain, length=32, bos="yes")


@pytest.mark.parametrize("before", [(256, 257), (257, 256), (256,)])
@pytest.mark.parametrize("named", [True, False])
def test_windows_begin_with_all_tokens_that_the_tokenizer_puts_before_a_text(tmp_path, before, named):
    """Whether or not one of them is named as BOS token."""
    words, k = tiny.tokenizer(), len(before)
    special = [("<s>", 256), ("</s>", 257)]
    template = " ".join(["<s>", "</s>"][token - 256] for token in before)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{template} $A", special_tokens=special
    )
    if not named:
        words.bos_token = None
    documents = texts(30)
    source = jsonl(tmp_path / "a.jsonl", documents)
    text = words("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    for bos in ("auto", "yes"):
        windows = load_windows(source, words, length=16, bos=bos)
        assert windows.bos
        assert (windows.ids[:, :k] == torch.tensor(before)).all()
        assert windows.ids[:, k:].flatten().tolist() == text[: len(text) // (16 - k) * (16 - k)]
        assert windows.text_bytes == windows.ids[:, k:].numel()  # one token a byte
        drawn = load_calibration(source, words, samples=8, length=16, bos=bos)
        assert drawn.bos
        assert drawn.prefix == before
        assert (drawn.ids[:, :k] == torch.tensor(before)).all()
        assert (drawn.ids[:, k] < 256).all()
    assert load_windows(source, words, length=16, bos="no").ids.flatten()[: k + 1].tolist() == [*before, text[0]]
    drawn = load_calibration(source, words, samples=8, length=16, bos="yes", sampling="papers").ids
    assert (drawn[:, :k] == torch.tensor(before)).all()
    for load in (load_windows, load_calibration):
        with pytest.raises(BillhookError, match="no room for text after" if k > 1 else "at least"):
            load(source, words, length=k, bos="yes")


def test_packed_windows_begin_with_one_bos_token_and_share_no_text(tokenizer, tmp_path):
    documents = [f"{number:07d}" * 3 for number in range(60)]
    ids = load_calibration(jsonl(tmp_path / "a.jsonl", documents), tokenizer, samples=20, length=22).ids
    assert (ids[:, 0] == 256).all()
    assert not ((ids[:, :-1] == 256) & (ids[:, 1:] == 256)).any()
    seen = [window.tolist()[1:] for window in ids if (window[1:] != 256).all()]
    assert len({tuple(window) for window in seen}) == len(seen) == 20  # each a document, as 22 is one with its BOS


def test_papers_sampling_can_begin_with_bos(tokenizer, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts())
    begun = load_calibration(source, tokenizer, samples=20, length=64, sampling="papers", bos="yes").ids
    assert (begun[:, 0] == 256).all()
    assert (begun[:, 1:] != 256).all()


def test_given_tokens_are_not_begun(tokenizer, tmp_path):
    save_file({"tokens": torch.zeros(2, 8, dtype=torch.int64)}, tmp_path / "t.safetensors")
    for load in (load_calibration, load_windows):
        assert load(str(tmp_path / "t.safetensors"), tokenizer, length=8).bos is None
        with pytest.raises(BillhookError, match="used as they are"):
            load(str(tmp_path / "t.safetensors"), tokenizer, length=8, bos="yes")
        with pytest.raises(BillhookError, match="auto, yes, no"):
            load(jsonl(tmp_path / "a.jsonl", texts()), tokenizer, length=8, bos="sometimes")


def test_limited_windows_are_the_first_of_all(tokenizer, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts(400))
    all_windows, some = load_windows(source, tokenizer, length=50), load_windows(source, tokenizer, length=50, limit=7)
    assert torch.equal(some.ids, all_windows.ids[:7])
    assert some.tokens < all_windows.tokens
    assert len(load_windows(source, tokenizer, length=50, limit=10**6).ids) == len(all_windows.ids)


@pytest.mark.parametrize("length", [2, 7, 64])
def test_bytes_are_those_of_the_scored_tokens(tokenizer, tmp_path, length):
    """With one token a byte: one byte for every token that is scored, but for letters cut by a window's edge."""
    ascii_text = "plain text, nothing else. " * 20
    (tmp_path / "a.txt").write_text(ascii_text)
    windows = load_windows(str(tmp_path / "a.txt"), tokenizer, length=length)
    assert windows.text_bytes == windows.ids.shape[0] * (length - 1)
    source = tiny.text_file(tmp_path / "b.txt", copies=20)
    whole = load_windows(str(source), tokenizer, length=len(tokenizer(source.read_text(encoding="utf-8"))["input_ids"]))
    assert whole.text_bytes == source.stat().st_size


def test_line_ends_and_byte_order_marks_are_read_as_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\r\ncd")
    ids = load_windows(str(tmp_path / "a.txt"), tokenizer, length=7).ids
    assert tokenizer.decode(ids[0]) == "<s>ab\r\ncd"


def test_half_a_surrogate_pair_in_json_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "smile \\ud83d half"}\n')
    assert tokenizer.decode(load_windows(str(tmp_path / "a.jsonl"), tokenizer, length=13).ids[0]) == "<s>smile ? half"


def test_the_standard_library_is_a_source(tokenizer, monkeypatch):
    kept = {"train": "trained on this " * 50, "heldout": "but not on that " * 50}
    monkeypatch.setattr(corpus, "stdlib_documents", lambda split: [("module.py", kept[split])])
    train = load_calibration("stdlib:train", tokenizer, samples=2, length=64)
    heldout = load_windows("stdlib:heldout", tokenizer, length=64, limit=2)
    assert "trained on this" in tokenizer.decode(train.ids[0])
    assert "not on that" in tokenizer.decode(heldout.ids[1])


def test_digest_depends_on_shape_and_values():
    ids = torch.arange(12)
    known = {digest(ids.view(3, 4)), digest(ids.view(4, 3)), digest((ids + 1).view(3, 4))}
    assert len(known) == 3
    assert digest(ids.view(3, 4).to(torch.int32)) in known


def test_bytes_of_tokens_agree_with_a_calculation_by_hand():
    text = "aé€😀"  # 1, 2, 3 and 4 bytes
    ends = _byte_ends(text, [(0, 0), (0, 1), (1, 2), (2, 3), (2, 3), (3, 4), (0, 0)])
    np.testing.assert_array_equal(ends, [0, 1, 3, 6, 6, 10, 10])


@pytest.mark.parametrize("form", ["file", "dataset"])
@pytest.mark.parametrize("purpose", ["evaluation", "packed", "papers"])
def test_rows_without_text_are_skipped_and_counted(tokenizer, tmp_path, caplog, form, purpose):
    """What follows a null is read as if the null were not there."""
    found = []
    for name, rows in (("with", [*texts()[:2], None, *texts()[2:], None]), ("without", texts())):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        source = str(folder / "a.jsonl") if form == "file" else f"hub:{folder}::train"
        if purpose == "evaluation":
            found.append(load_windows(source, tokenizer, length=32).ids)
        else:
            found.append(load_calibration(source, tokenizer, samples=4, length=32, sampling=purpose).ids)
    assert torch.equal(*found)
    assert "null: 2." in caplog.text or purpose == "packed"  # a calibration may have enough before the end


def test_a_column_that_is_not_text_is_refused_by_its_row(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    for read in (load_windows, load_calibration):
        with pytest.raises(BillhookError, match=r"row 1: the text is of type int, not a string"):
            read(f"hub:{tmp_path}::train", tokenizer, length=32)


@pytest.mark.parametrize("sampling", ["packed", "papers"])
def test_held_out_windows_follow_and_have_nothing_in_common_with_the_others(tmp_path, sampling):
    documents = [json.dumps({"text": f"letter {chr(97 + i)} " * 12}) for i in range(26)]
    (tmp_path / "text.jsonl").write_text("\n".join(documents), encoding="utf-8")
    asked = {"samples": 6, "length": 32, "sampling": sampling}
    plain = load_calibration(str(tmp_path / "text.jsonl"), tiny.tokenizer(), **asked)
    found = load_calibration(str(tmp_path / "text.jsonl"), tiny.tokenizer(), **asked, held_out=4)
    assert torch.equal(found.ids, plain.ids)
    assert (found.digest, plain.heldout) == (plain.digest, None)
    assert found.heldout.shape == (4, 32)
    assert not {tuple(row) for row in found.ids.tolist()} & {tuple(row) for row in found.heldout.tolist()}


def test_a_text_without_more_windows_has_none_held_out(tmp_path):
    path = tiny.text_file(tmp_path / "text.txt", copies=5)
    found = load_calibration(str(path), tiny.tokenizer(), samples=12, length=32, held_out=4)
    assert found.heldout is None or len(found.heldout) < 4
    assert found.ids.shape == (12, 32)
