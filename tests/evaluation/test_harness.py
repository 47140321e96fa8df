"""Evaluation: divergence, likelihoods, tasks and word perplexity, against plain loops and against lm-evaluation-harness
itself."""

import json
import math

import pytest
import tiny
import torch
from command import billhook, done

from billhook.errors import BillhookError, JobError
from billhook.evaluation.batching import batch_size, halving
from billhook.evaluation.items import Item, evaluate_items, load_items
from billhook.evaluation.likelihood import TokenRequest, encode_request, log_likelihoods
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.word_perplexity import evaluate_words, rolling
from billhook.text.windows import load_windows

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "naïve",
    "façades",
    "cost",
    "twelve",
]


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def questions(count: int = 24) -> list[dict]:
    """Items with two to four answers of different lengths, and prompts that end with and without a space."""
    found = []
    for i in range(count):
        context = " ".join(WORDS[(i * 5 + j * 3) % len(WORDS)] for j in range(4 + i % 5)) + (" " if i % 3 == 0 else "")
        answers = [f" {WORDS[(i + j) % len(WORDS)]}{' indeed' * (j % 2)}" for j in range(2 + i % 3)]
        found.append({"requests": [[context, answer] for answer in answers], "gold": i % len(answers)})
    return found


@pytest.fixture
def item_file(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in questions()), encoding="utf-8")
    return path


def test_a_model_agrees_with_itself_and_not_with_another(model):
    ids = torch.randint(0, 258, (5, 32), generator=torch.Generator().manual_seed(1))
    same = evaluate(model, ids, against=model).against
    assert (same.kl, same.kl_error, same.top1_agreement) == (0, 0, 1)
    other = tiny.llama(seed=1)
    found = evaluate(model, ids, against=other)
    assert found.against.kl > 0.1 > found.against.kl_error
    assert found.against.nll == evaluate(other, ids).nll
    assert found.nll == evaluate(model, ids).nll
    assert evaluate(model, ids, against=other, batch_size=2).against.kl == pytest.approx(found.against.kl, rel=1e-5)
    with pytest.raises(BillhookError, match="258 and 300 token ids"):
        evaluate(model, ids, against=tiny.llama(vocab_size=300))


def test_batches_are_halved_where_memory_is_short():
    seen = []

    def work(start, stop):
        if stop - start > 3:
            raise RuntimeError("cannot allocate memory")
        seen.append((start, stop))
        return stop - start

    assert sum(n for *_, n in halving(10, 8, work)) == 10
    assert seen[0] == (0, 2)
    assert [b for _, b in seen[:-1]] == [a for a, _ in seen[1:]]
    with pytest.raises(RuntimeError, match="memory"):
        list(halving(2, 2, lambda a, b: (_ for _ in ()).throw(RuntimeError("out of memory"))))
    with pytest.raises(RuntimeError, match="shape"):
        list(halving(2, 2, lambda a, b: (_ for _ in ()).throw(RuntimeError("wrong shape"))))
    assert batch_size(2048, 128_000, 4) == 1
    assert batch_size(256, 2048, 4) == 8


def test_likelihoods_are_those_of_one_request_at_a_time(model):
    pick = torch.Generator().manual_seed(2)
    requests = []
    for n in (1, 3, 9, 9, 30, 130):
        ids = torch.randint(0, 258, (n + 3,), generator=pick).tolist()
        requests += [TokenRequest(ids[:n], ids[n:]), TokenRequest(ids[:n], [*ids[n:-1], 5])]
    found = log_likelihoods(model, requests, 128)
    for request, (value, greedy) in zip(requests, found, strict=True):
        ids = torch.tensor([(request.context + request.continuation)[-129:]])
        predicted = torch.log_softmax(model(ids[:, :-1]).logits[0, -3:].detach().double(), -1)
        expected = sum(float(predicted[i, t]) for i, t in enumerate(request.continuation))
        assert value == pytest.approx(expected, rel=1e-4)
        assert greedy == (predicted.argmax(-1).tolist() == request.continuation)
    with pytest.raises(BillhookError, match="token id 999"):
        log_likelihoods(model, [TokenRequest([1], [999])], 128)
    with pytest.raises(BillhookError, match="continuation of 9 tokens exceeds"):
        log_likelihoods(model, [TokenRequest([1], [3] * 9)], 8)


def test_a_damaged_model_gives_no_accuracy(tokenizer):
    broken = tiny.llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(JobError, match="not finite"):
        evaluate_items(broken, tokenizer, [Item((("a", " b"),), 0)], 128, name="x")


def test_items_are_judged_by_hand(model, tokenizer):
    """Right where the right answer is likelier; a single request is right where the model would say it."""
    items = [Item(tuple((c, a) for c, a in q["requests"]), q["gold"]) for q in questions(9)]
    hits = fair = 0
    for item in items:
        scores = []
        for context, answer in item.requests:
            spaces = len(context) - len(context.rstrip())
            whole, before = (
                tokenizer(context + answer)["input_ids"],
                tokenizer(context[: len(context) - spaces])["input_ids"],
            )
            predicted = torch.log_softmax(model(torch.tensor([whole])).logits[0].detach().double(), -1)
            scores.append(sum(float(predicted[i - 1, whole[i]]) for i in range(len(before), len(whole))))
        hits += scores.index(max(scores)) == item.gold
        ratios = [s / (len(a) - 1) for s, (_, a) in zip(scores, item.requests, strict=True)]
        fair += ratios.index(max(ratios)) == item.gold
    found = evaluate_items(model, tokenizer, items, 128, name="hand")
    assert (found.acc, found.acc_norm, found.items) == (hits / 9, fair / 9, 9)
    assert found.acc_error == pytest.approx(math.sqrt(found.acc * (1 - found.acc) / 8))
    context = "a lazy"
    ids = tokenizer(context)["input_ids"]
    said = tokenizer.decode([int(model(torch.tensor([ids])).logits[0, -1].argmax())])
    if encode_request(tokenizer, context, said).continuation == [
        int(model(torch.tensor([ids])).logits[0, -1].argmax())
    ]:
        single = evaluate_items(
            model, tokenizer, [Item(((context, said),), 0), Item(((context, "\x00\x01"),), 0)], 128, name="said"
        )
        assert (single.acc, single.acc_norm) == (0.5, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no item"),
        ('{"requests": [["a", "b"]]}', "line 2 is no item"),
        ('{"requests": [], "gold": 0}', "at least one"),
        ('{"requests": [["a", 1]], "gold": 0}', "pairs of strings"),
        ('{"requests": [["a", "b"]], "gold": 1}', "a number from 0 to 0, got 1"),
        ('{"requests": ["ab"], "gold": 0, "x": [}', "line 2 is no item"),
    ],
)
def test_lines_that_are_no_items_are_named(line, message, tmp_path):
    good = '{"requests": [["a", "b"]], "gold": 0}'
    (tmp_path / "t.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(BillhookError, match=message):
        load_items(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(BillhookError, match="is empty"):
        load_items(tmp_path / "t.jsonl")


def test_every_token_of_a_document_is_scored_once():
    for count in (1, 7, 8, 9, 16, 23):
        windows = rolling(list(range(100, 100 + count)), 1, 8)
        assert [t for w in windows for t in w.continuation] == list(range(100, 100 + count))
        assert all(len(w.inputs(8)) <= 8 for w in windows)
        assert windows[0].context == [1]
        assert all(w.context[-1] == w.continuation[0] - 1 for w in windows[1:])


def test_word_perplexity_divides_by_words(model, tokenizer):
    found = evaluate_words(model, tokenizer, ["one two", "three"], 64, "here")
    assert (found.words, found.documents) == (3, 2)
    assert found.word_ppl ** (3 / 12) == pytest.approx(found.byte_ppl)  # 12 bytes
    assert found.bits_per_byte == pytest.approx(math.log2(found.byte_ppl))


@pytest.fixture(scope="module")
def harness(model, tokenizer):
    """The harness's own wrapper around the same model and tokenizer."""
    module = pytest.importorskip("lm_eval.models.huggingface")
    return module.HFLM(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=3, softmax_dtype="float32")


def test_likelihoods_agree_with_lm_eval(harness, model, tokenizer):
    from lm_eval.api.instance import Instance

    pairs = [tuple(pair) for q in questions(8) for pair in q["requests"]] + [
        ("", "alone"),
        ("x" * 80, " tail"),
        ("<s>begun", " already"),
    ]
    theirs = harness.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    ours = log_likelihoods(model, [encode_request(tokenizer, *pair) for pair in pairs], 64)
    for (a, greedy), (b, same) in zip(theirs, ours, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
        assert same == greedy


def test_word_perplexity_agrees_with_lm_eval(harness, model, tokenizer):
    from lm_eval.api.instance import Instance

    texts = ["short one", " ".join(WORDS * 4), "x" * 200]
    theirs = harness.loglikelihood_rolling([Instance("r", {}, (t,), i) for i, t in enumerate(texts)], disable_tqdm=True)
    ours = evaluate_words(model, tokenizer, texts, 64, "here")
    assert ours.word_ppl == pytest.approx(math.exp(-sum(theirs) / ours.words), rel=1e-5)


def lm_eval_task(folder, file) -> str:
    """The items of a file as a task in lm-eval's own format."""
    (folder / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {file}\ntest_split: train\noutput_type: "
        "multiple_choice\n"
        'doc_to_text: "{{requests[0][0]}}"\ndoc_to_choice: "{{requests|map(\'last\')|list}}"\n'
        'doc_to_target: gold\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return str(folder / "mine.yaml")


@pytest.mark.nightly
def test_items_give_the_same_accuracy_through_lm_eval(tmp_path, item_file, monkeypatch):
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tiny.save(tmp_path / "model")
    tasks = f"{item_file},{lm_eval_task(tmp_path, item_file)}"
    ours, theirs = done("eval", directory, "--tasks", tasks, "--json").json["tasks"]
    assert (theirs["acc"], theirs["items"]) == (ours["acc"], ours["items"])
    assert theirs["acc_error"] == pytest.approx(ours["acc_error"])
    assert theirs["scored_by"].startswith("lm-eval 0.")
    assert theirs["few_shot"] == "0-shot"


@pytest.mark.nightly
def test_real_items_give_the_same_accuracy_through_lm_eval(tmp_path, shared, monkeypatch):
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = (shared / "tasks" / "tinystories_cloze.jsonl").read_text(encoding="utf-8").splitlines()[:150]
    (tmp_path / "cloze.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tasks = f"{tmp_path / 'cloze.jsonl'},{lm_eval_task(tmp_path, tmp_path / 'cloze.jsonl')}"
    ours, theirs = done("eval", shared / "models" / "stories260k", "--tasks", tasks, "--json").json["tasks"]
    assert theirs["acc"] == ours["acc"] > 0.4


def test_the_command_labels_what_it_prints(tmp_path, item_file):
    directory = tiny.save(tmp_path / "model")
    text = tiny.text_file(tmp_path / "text.txt", copies=20)
    ran = done(
        "eval",
        directory,
        "--data",
        text,
        "--length",
        64,
        "--protocol",
        "both",
        "--against",
        directory,
        "--tasks",
        item_file,
        "--json",
    )
    for words in (
        "token perplexity",
        "word perplexity",
        "KL divergence 0.0000",
        "top-1 agreement 100.00 %",
        "items: acc",
    ):
        assert words in ran.err
    assert ran.json["protocol"].startswith("token perplexity")
    assert ran.json["word"]["protocol"].startswith("word perplexity")
    assert ran.json["digest"] == load_windows(str(text), tiny.tokenizer(), length=64).digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Say what to score"),
        (["--data", "t.txt", "--length", "400"], "exceed the model's context of 128"),
        (["--data", "empty.txt"], "is empty"),
        (["--data", "t.safetensors", "--protocol", "word"], "a token file has none"),
        (["--tasks", "items.jsonl", "--against", "model"], "--against compares predictions on the windows of a text"),
        (["--tasks", "gone.jsonl"], "no file gone.jsonl"),
        (["--tasks", "items.jsonl", "--few-shot", "5"], "--few-shot is for tasks of lm-eval"),
        (["--tasks", "items.jsonl", "--limit", "5"], "--protocol and --limit are for the text of --data"),
        (["--tasks", "items.jsonl", "--batch-size", "5"], "--batch-size is for token perplexity"),
        (["--data", "t.txt", "--task-limit", "5"], "--task-limit is for --tasks"),
        (["--tasks", "latin.jsonl"], "is not UTF-8 text"),
    ],
)
def test_bad_questions_are_answered_in_a_line(options, message, tmp_path, item_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model")
    tiny.text_file(tmp_path / "t.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    ran = billhook("eval", "model", *options)
    assert ran.code == 2
    assert message in ran.err


@pytest.mark.nightly
def test_unknown_tasks_and_tasks_without_network(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    directory = tiny.save(tmp_path / "model")
    ran = billhook("eval", directory, "--tasks", "bolq")
    assert ran.code == 2
    assert "Unknown task 'bolq'. Did you mean 'boolq'?" in ran.err
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: "
        "a\ndoc_to_choice: [a]\n"
        "doc_to_target: 0\n"
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    ran = billhook("eval", directory, "--tasks", tmp_path / "far.yaml")
    assert ran.code == 2
    assert "cannot be fetched" in ran.err
    assert "a file of items works without network" in ran.err


def test_a_packed_model_is_scored_like_the_one_it_was_made_from(tmp_path):
    source = tiny.save(tmp_path / "model")
    text = tiny.text_file(tmp_path / "text.txt", copies=10)
    done("prune", source, "--sparsity", "0.6", "--criterion", "magnitude", "-o", tmp_path / "pruned")
    done("pack", tmp_path / "pruned", "-o", tmp_path / "packed")
    words = ["--data", text, "--length", 32, "--json"]
    dense, packed = (done("eval", tmp_path / name, *words).json for name in ("pruned", "packed"))
    assert packed["nll"] == pytest.approx(dense["nll"], rel=1e-5)
    assert packed["digest"] == dense["digest"]
    against = done("eval", tmp_path / "packed", *words, "--against", tmp_path / "pruned").json["against"]
    assert against["kl"] == pytest.approx(0, abs=1e-6)
    assert against["top1_agreement"] == 1
