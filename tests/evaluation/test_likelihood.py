"""Likelihoods of documents and answers, items and word perplexity, against plain loops."""

import math

import pytest
import tiny
import torch
from documents import WORDS, questions

from billhook.errors import BillhookError, JobError
from billhook.evaluation.batching import batch_size, halving
from billhook.evaluation.items import Item, evaluate_items, load_items
from billhook.evaluation.likelihood import TokenRequest, encode_request, log_likelihoods
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.word_perplexity import evaluate_words, rolling


def test_the_divergence_from_itself_is_zero_and_from_another_model_is_not(model):
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


def test_items_are_scored_as_by_hand(model, tokenizer):
    """Right where the right answer is likelier."""
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


def test_a_single_request_is_right_where_the_model_would_say_it(model, tokenizer):
    said = {}
    for context in (f"{one} {other}" for one in WORDS for other in WORDS):
        token = int(model(torch.tensor([tokenizer(context)["input_ids"]])).logits[0, -1].argmax())
        answer = tokenizer.decode([token])
        if answer.strip() and encode_request(tokenizer, context, answer).continuation == [token]:
            said[context] = answer
    assert said
    right = [Item(((context, answer),), 0) for context, answer in said.items()]
    wrong = [Item(((context, "\x00\x01"),), 0) for context in said]
    found = evaluate_items(model, tokenizer, right + wrong, 128, name="said")
    assert (found.acc, found.acc_norm) == (0.5, None)


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
def test_lines_that_are_no_items_are_refused(line, message, tmp_path):
    good = '{"requests": [["a", "b"]], "gold": 0}'
    (tmp_path / "t.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(BillhookError, match=message):
        load_items(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(BillhookError, match="is empty"):
        load_items(tmp_path / "t.jsonl")


def test_every_token_of_a_document_is_scored_once():
    for count in (1, 7, 8, 9, 16, 23):
        windows = rolling(list(range(100, 100 + count)), [1], 8)
        assert [t for w in windows for t in w.continuation] == list(range(100, 100 + count))
        assert all(len(w.inputs(8)) == min(count, 8) for w in windows)  # the last one begins earlier
        assert windows[0].context == [1]
        assert all(w.context[-1] == w.continuation[0] - 1 for w in windows[1:])


def test_windows_of_a_document_begin_with_bos_and_its_tokens_are_scored_once():
    for count in (1, 7, 8, 9, 16, 23):
        windows = rolling(list(range(100, 100 + count)), [1], 8, [1])
        assert [t for w in windows for t in w.continuation] == list(range(100, 100 + count))
        assert all(w.context[0] == 1 and len(w.inputs(8)) <= 8 for w in windows)
        assert all(w.inputs(8)[0] == 1 for w in windows)


def test_windows_of_a_document_begin_with_all_tokens_of_a_prefix():
    for count in (1, 7, 8, 9, 16, 23):
        windows = rolling(list(range(100, 100 + count)), [1, 2], 8, [1, 2])
        assert [t for w in windows for t in w.continuation] == list(range(100, 100 + count))
        assert all(w.inputs(8)[:2] == (1, 2)[: len(w.inputs(8))] and len(w.inputs(8)) <= 8 for w in windows)


def test_the_bos_token_that_a_tokenizer_adds_is_not_scored(model, tokenizer):
    """One token a byte: with BOS, as many scored tokens as bytes."""
    texts = ["one two", "three " * 30]
    assert evaluate_words(model, tokenizer, texts, 64, "here", bos="auto").tokens == sum(map(len, texts))


def test_word_perplexity_divides_by_words(model, tokenizer):
    found = evaluate_words(model, tokenizer, ["one two", "three"], 64, "here")
    assert (found.words, found.documents) == (3, 2)
    assert found.word_ppl ** (3 / 12) == pytest.approx(found.byte_ppl)  # 12 bytes
    assert found.bits_per_byte == pytest.approx(math.log2(found.byte_ppl))
