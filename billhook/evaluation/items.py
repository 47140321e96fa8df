"""Zero-shot tasks from local files, scored as lm-evaluation-harness scores its multiple-choice tasks.

A line of the file is one item: {"requests": [[context, continuation], ...], "gold": number of the right one}. The
model's answer is the continuation of the largest log-likelihood; `acc_norm` divides by the characters of the
continuation first. An item with a single request is right when the model would say the continuation token by token, as
in LAMBADA. Prompts are used as they stand.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from billhook.errors import BillhookError
from billhook.evaluation.likelihood import encode_request, log_likelihoods
from billhook.store.files import sha256
from billhook.text.corpus import existing_file

FORM = '{"requests": [["context", " continuation"], ...], "gold": 0}'


@dataclass(frozen=True)
class Item:
    """One question: (context, continuation) pairs, and which of them is right."""

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

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, for json."""
        return asdict(self)


def load_items(source: str | Path, limit: int | None = None) -> list[Item]:
    """Read the items of a .jsonl file, at most `limit`; raises BillhookError naming the first line that is no item."""
    path = existing_file(str(source))
    items = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BillhookError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): a task is a file of json lines."
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(_item(line, f"{path}, line {number}"))
    if not items:
        raise BillhookError(f"{path} is empty: a task needs items, one a line: {FORM}.")
    return items[:limit]


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
    return Item(requests, gold)


def evaluate_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    longest: int,
    *,
    name: str,
    identity: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Score `items`; `longest` is the model's context in tokens. Raises what `encode_request` and `log_likelihoods`
    raise."""
    import billhook

    requests = [encode_request(tokenizer, *pair) for item in items for pair in item.requests]
    values = iter(log_likelihoods(model, requests, longest, progress=progress))
    hits, normed = [], []
    for item in items:
        found = [next(values) for _ in item.requests]
        if len(found) == 1:
            hits.append(found[0][1])
            continue
        scores = [value for value, _ in found]
        # a leading space joins the answer to the question and is not counted as part of it
        fair = [
            value / max(1, len(text.removeprefix(" "))) for value, (_, text) in zip(scores, item.requests, strict=True)
        ]
        hits.append(scores.index(max(scores)) == item.gold)
        normed.append(fair.index(max(fair)) == item.gold)
    acc, error = _mean(hits)
    acc_norm, norm_error = _mean(normed) if len(normed) == len(items) else (None, None)
    return TaskResult(
        name,
        acc,
        error,
        acc_norm,
        norm_error,
        len(items),
        "as written in the file",
        f"billhook {billhook.__version__}",
        identity,
    )


def evaluate_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    longest: int,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Score the items of a .jsonl file; the result names the file and carries its SHA-256."""
    items = load_items(source, limit)
    identity = f"sha256:{sha256(Path(source).expanduser())}" + (
        "" if limit is None else f", the first {len(items)} items"
    )
    return evaluate_items(
        model, tokenizer, items, longest, name=Path(source).stem, identity=identity, progress=progress
    )


def _mean(hits: Sequence[bool]) -> tuple[float, float]:
    """The share of hits and its standard error."""
    share = sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / max(1, len(hits) - 1))
