"""Zero-shot tasks from local files, scored as lm-evaluation-harness scores its multiple-choice tasks.

Each line of the file is an item: {"requests": [[context, continuation], ...], "gold": index of the correct one}. The
model's answer is the continuation with the largest log-likelihood, for `acc_norm` divided by its number of characters.
An item with a single request is correct if every token of the continuation is the top-1 prediction, as in LAMBADA.
Prompts are used unchanged.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.errors import BillhookError
from billhook.evaluation.batching import Progress
from billhook.evaluation.likelihood import encode_request, log_likelihoods
from billhook.store.files import sha256
from billhook.text.corpus import existing_file, lines
from billhook.text.rows import cleaned

FORM = '{"requests": [["context", " continuation"], ...], "gold": 0}'


@dataclass(frozen=True)
class Item:
    """One question: (context, continuation) pairs, and the index of the correct one."""

    requests: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class TaskResult:
    """The accuracy of a model on one task.

    * `task`: name of the task or file; a metric other than accuracy follows in brackets.
    * `acc`: fraction of right answers.
    * `acc_error`: its standard error over items.
    * `acc_norm`: the same with log-likelihoods divided by the characters of the answer; null if the task has none.
    * `acc_norm_error`: its standard error.
    * `items`: answered items.
    * `few_shot`: examples in a prompt, such as `0-shot`, or `as written in the file`.
    * `scored_by`: program and version that scored it.
    * `identity`: version of the task, or SHA-256 of the file.
    """

    task: str
    acc: float
    acc_error: float | None
    acc_norm: float | None
    acc_norm_error: float | None
    items: int
    few_shot: str
    scored_by: str
    identity: str


def load_items(source: str | Path, limit: int | None = None) -> list[Item]:
    """Read the items of a .jsonl file, at most `limit`; raises BillhookError naming the first line that is no item."""
    path = existing_file(str(source))
    return [_item(line, where) for where, line in lines(path)][:limit]


def _item(line: str, where: str) -> Item:
    try:
        value = json.loads(line)
        requests = tuple((context, continuation) for context, continuation in value["requests"])
        gold = value["gold"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BillhookError(f"{where} is no item ({type(error).__name__}: {error}): write {FORM}.") from None
    if not requests or not all(isinstance(text, str) for pair in requests for text in pair):
        raise BillhookError(f"{where}: `requests` must be pairs of strings, at least one: {FORM}.")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(requests):
        raise BillhookError(f"{where}: `gold` must be a number from 0 to {len(requests) - 1}, got {gold!r:.40}.")
    return Item(tuple((cleaned(context), cleaned(continuation)) for context, continuation in requests), gold)


def evaluate_items(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    longest: int,
    *,
    name: str,
    identity: str = "",
    progress: Progress | None = None,
) -> TaskResult:
    """Score items; `longest` is the model's context in tokens. Raises as `encode_request` and `log_likelihoods` do."""
    import billhook

    requests = [encode_request(tokenizer, *pair) for item in items for pair in item.requests]
    values = iter(log_likelihoods(model, requests, longest, progress=progress))
    hits, normalized = [], []
    for item in items:
        found = [next(values) for _ in item.requests]
        if len(found) == 1:
            hits.append(found[0][1])
            continue
        scores = [value for value, _ in found]
        # the leading space that joins answer and question is not counted
        lengths = [max(1, len(text.removeprefix(" "))) for _, text in item.requests]
        norms = [value / length for value, length in zip(scores, lengths, strict=True)]
        hits.append(scores.index(max(scores)) == item.gold)
        normalized.append(norms.index(max(norms)) == item.gold)
    acc, acc_error = _mean(hits)
    norm, norm_error = _mean(normalized) if len(normalized) == len(items) else (None, None)
    return TaskResult(
        name, acc=acc, acc_error=acc_error, acc_norm=norm, acc_norm_error=norm_error, items=len(items),
        few_shot="as written in the file", scored_by=f"billhook {billhook.__version__}", identity=identity,
    )  # fmt: skip


def evaluate_file(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    source: str,
    longest: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Score the items of a .jsonl file; the result names the file and carries its SHA-256."""
    items = load_items(source, limit)
    part = "" if limit is None else f", the first {len(items)} items"
    identity = f"sha256:{sha256(Path(source).expanduser())}{part}"
    name = Path(source).stem
    return evaluate_items(model, tokenizer, items, longest, name=name, identity=identity, progress=progress)


def _mean(hits: Sequence[bool]) -> tuple[float, float]:
    """The fraction of hits and its standard error."""
    share = sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / max(1, len(hits) - 1))
