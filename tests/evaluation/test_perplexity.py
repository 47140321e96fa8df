"""Perplexity: the protocol of the papers, the same for any batching; their numbers are in test_golden.py."""

import math
import sys

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tokenizers import processors

from billhook.architectures.config import check_length, context_length, vocabulary_size
from billhook.errors import BillhookError, JobError
from billhook.evaluation.perplexity import evaluate
from billhook.tasks.base import Drawing, Home
from billhook.tasks.text_generation import TextGeneration
from billhook.text.windows import Windows, digest, load_windows


def windows_of(ids: torch.Tensor, text_bytes: int | None = None) -> Windows:
    return Windows(ids, "test", digest(ids), ids.numel(), text_bytes)


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def windows():
    return windows_of(torch.randint(0, 258, (7, 32), generator=torch.Generator().manual_seed(0)), text_bytes=200)


def test_perplexity_agrees_with_the_published_protocol(model, windows):
    """Window by window, mean loss times length, divided by all tokens, exponentiated."""
    total = 0.0
    for row in windows.ids:
        logits = model(row[None]).logits
        total += 32 * torch.nn.functional.cross_entropy(logits[0, :-1], row[1:]).item()
    found = evaluate(model, windows)
    assert found.token_ppl == pytest.approx(math.exp(total / (7 * 32)), rel=1e-6)
    assert (found.tokens, found.windows, found.length) == (7 * 31, 7, 32)
    assert found.bits_per_byte == pytest.approx(found.nll * found.tokens / math.log(2) / 200)
    assert found.to_dict()["token_ppl"] == found.token_ppl


def test_sums_do_not_depend_on_batches_and_chunks(model, windows, monkeypatch):
    expected = evaluate(model, windows).nll
    for size in (1, 3, 100):
        assert evaluate(model, windows, batch_size=size).nll == pytest.approx(expected, rel=1e-6)
    module = sys.modules["billhook.evaluation.perplexity"]  # the name in the package is the function
    monkeypatch.setattr(module, "_LOSS_BYTES", 4 * 258 * 5)
    monkeypatch.setattr(sys.modules["billhook.evaluation.batching"], "LOGIT_BYTES", 1)
    assert evaluate(model, windows).nll == pytest.approx(expected, rel=1e-6)


def test_evaluation_is_deterministic_and_leaves_the_model_unchanged(model, windows):
    model.train()
    first = evaluate(model, windows)
    assert model.training
    model.eval()
    assert evaluate(model, windows) == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_weights_get_a_float32_loss(windows):
    half = tiny.llama().to(torch.bfloat16)
    assert evaluate(half, windows).nll == pytest.approx(evaluate(half.float(), windows).nll, rel=0.02)


def test_progress_counts_windows(model, windows):
    calls = []
    evaluate(model, windows, batch_size=3, progress=calls.append)
    assert calls == ["3/7 windows", "6/7 windows", "7/7 windows"]


def test_windows_beyond_the_context_are_refused(model):
    assert context_length(model.config) == 128
    with pytest.raises(
        BillhookError, match="Windows of 129 tokens exceed the model's context of 128: use length=128 or less"
    ):
        evaluate(model, windows_of(torch.zeros(1, 129, dtype=torch.int64)))
    check_length(model.config, 128)


def test_ids_beyond_the_embeddings_are_refused(model):
    assert vocabulary_size(model) == 258
    with pytest.raises(BillhookError, match="token id 258 at row 0, position 3 is outside the vocabulary of 258"):
        evaluate(model, windows_of(torch.tensor([[0, 1, 2, 258]])))


def test_a_damaged_model_is_an_error_and_not_scored(windows):
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(JobError, match="loss on window 0 of test is not a finite number"):
        evaluate(model, windows)


def test_a_certain_and_wrong_model_has_infinite_perplexity(windows):
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    found = evaluate(model, windows)
    assert found.token_ppl == math.inf
    assert math.isfinite(found.nll)


def test_bits_per_byte_count_the_bytes_of_the_text(model, tmp_path):
    """One token a byte: bits per byte are bits per token."""
    (tmp_path / "a.txt").write_text("plain text, nothing else. " * 20)
    found = evaluate(model, load_windows(str(tmp_path / "a.txt"), tiny.tokenizer(), length=64))
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2))


def test_token_files_have_no_bits_per_byte(model, tmp_path):
    save_file({"tokens": torch.zeros(2, 8, dtype=torch.int32)}, tmp_path / "t.safetensors")
    assert evaluate(model, load_windows(str(tmp_path / "t.safetensors"), None, length=8)).bits_per_byte is None


def test_the_tokens_with_which_all_windows_begin_are_not_scored(tmp_path):
    words, model = tiny.tokenizer(), tiny.llama()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tiny.save(tmp_path, model, words=False)
    words.save_pretrained(tmp_path)
    source = str(tiny.text_file(tmp_path / "text.txt"))
    windows, scoring = TextGeneration().evaluation(source, words, model, 16)
    found = evaluate(model, windows, scoring=scoring)
    assert found.tokens == windows.text_bytes == 14 * len(windows.ids)  # one token a byte
    labels = TextGeneration().samples(source, model, Home(tmp_path), Drawing(samples=4, length=16)).batch["labels"]
    assert (labels[:, :2] == -100).all()
    assert (labels[:, 2:] >= 0).all()
