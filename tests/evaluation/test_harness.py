"""Zero-shot tasks: the results of lm-evaluation-harness, and what the command prints."""

import json
import math

import pytest
import tiny
from command import billhook, done
from documents import WORDS, questions

from billhook.evaluation.likelihood import encode_request, log_likelihoods
from billhook.evaluation.word_perplexity import evaluate_words
from billhook.text.windows import load_windows


@pytest.fixture
def item_file(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in questions()), encoding="utf-8")
    return path


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
        (["--tasks", "items.jsonl", "--against", "model"], "--against needs the windows of a text"),
        (["--tasks", "gone.jsonl"], "no file gone.jsonl"),
        (["--tasks", "items.jsonl", "--few-shot", "5"], "--few-shot is for tasks of lm-eval"),
        (["--tasks", "items.jsonl", "--limit", "5"], "--protocol and --limit are for --data"),
        (["--tasks", "items.jsonl", "--batch-size", "5"], "--batch-size is for token perplexity"),
        (["--data", "t.txt", "--task-limit", "5"], "--task-limit is for --tasks"),
        (["--tasks", "latin.jsonl"], "is not UTF-8 text"),
    ],
)
def test_unusable_options_of_eval_are_one_message(options, message, tmp_path, item_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model")
    tiny.text_file(tmp_path / "t.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    ran = billhook("eval", "model", *options)
    assert ran.code == 2
    assert message in ran.err


@pytest.mark.nightly
def test_unknown_tasks_and_tasks_without_network_are_refused(tmp_path, monkeypatch):
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


def test_a_packed_model_has_the_scores_of_the_dense_one(tmp_path):
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
