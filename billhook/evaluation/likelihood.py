"""Log-likelihood of continuations after contexts, for zero-shot tasks and word perplexity.

The rules, and so the numbers, are those of lm-evaluation-harness: spaces at the end of a context belong to the
continuation; context and continuation are tokenized together and split at the length of the tokenized context; an empty
context is the BOS (else EOS) token; inputs longer than the model's context are truncated from the left. Requests with
equal inputs run once.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.ambient import evaluating
from billhook.architectures.config import vocabulary_size
from billhook.errors import BillhookError, JobError
from billhook.evaluation.batching import Progress, batch_size, halving
from billhook.text.windows import check_ids


@dataclass(frozen=True)
class TokenRequest:
    """Score the token ids `continuation` after those of `context`; both have at least one."""

    context: list[int]
    continuation: list[int]

    def inputs(self, longest: int) -> tuple[int, ...]:
        """The model's input: all but the last token, truncated from the left to `longest`."""
        return tuple((self.context + self.continuation)[-(longest + 1) :][:-1])


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> TokenRequest:
    """Tokenize a request; raises BillhookError if the continuation has no token of its own."""
    bare = context.rstrip()
    context, continuation = bare, context[len(bare) :] + continuation
    if not context:
        first, ids = prefix_token(tokenizer), _ids(tokenizer, continuation, special=False)
        before, after = ([first], ids) if ids[:1] != [first] else (ids[:1], ids[1:])
    else:
        before, whole = _ids(tokenizer, context), _ids(tokenizer, context + continuation)
        after = whole[len(before) :]
    if not before or not after:
        raise BillhookError(f"The continuation {continuation!r:.60} has no token of its own after {context[-40:]!r}.")
    return TokenRequest(before, after)


def prefix_token(tokenizer: Tokenizer) -> int:
    """The token before the beginning of a text: BOS, else EOS; BillhookError without either."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise BillhookError("The tokenizer has neither a BOS nor an EOS token, which an empty context needs.")


def _ids(tokenizer: Tokenizer, text: str, special: bool | None = None) -> list[int]:
    # do not add a second BOS token
    begun = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    options = {"add_special_tokens": False} if begun or special is False else {}
    found: list[int] = tokenizer(text, verbose=False, return_attention_mask=False, **options)["input_ids"]
    return found


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, requests: Sequence[TokenRequest], longest: int, *, progress: Progress | None = None
) -> list[tuple[float, bool]]:
    """The log-likelihood (nats) of each continuation, and whether all its tokens are top-1 predictions.

    `longest` is the model's context in tokens. Raises BillhookError for ids outside the vocabulary and continuations
    longer than `longest`, JobError for a result that is NaN.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        if len(request.continuation) > longest:
            count = len(request.continuation)
            raise BillhookError(f"A continuation of {count} tokens exceeds the model's context of {longest}.")
        groups.setdefault(request.inputs(longest), []).append(index)
    rows = sorted(groups, key=lambda row: (-len(row), row))
    vocabulary = vocabulary_size(model)
    ids = {token for r in requests for token in (*r.context, *r.continuation)}
    check_ids(torch.tensor([sorted(ids)]), vocabulary, "the requests")
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    start = 0
    with evaluating(model):
        while start < len(rows):
            part = rows[start : start + batch_size(len(rows[start]), vocabulary, model.dtype.itemsize)]

            def work(first: int, last: int, part: list[tuple[int, ...]] = part) -> list[tuple[int, tuple[float, bool]]]:
                chosen = part[first:last]
                return _score(model, chosen, [[(i, requests[i].continuation) for i in groups[row]] for row in chosen])

            for _, _, scored in halving(len(part), len(part), work):
                for index, value in scored:
                    found[index] = value
            start += len(part)
            if progress is not None:
                progress(f"{start}/{len(rows)}")
    if any(value != value for value, _ in found):
        raise JobError("The model's predictions are not finite numbers: its weights are damaged.")
    return found


def _score(
    model: PreTrainedModel, rows: Sequence[tuple[int, ...]], wanted: Sequence[Sequence[tuple[int, list[int]]]]
) -> list[tuple[int, tuple[float, bool]]]:
    """Run rows of token ids, padded on the right, and score the continuations `wanted` at the end of each."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    # Attention is causal, so padding on the right has no effect. Logits are computed from the first needed position on.
    first = min(len(row) - max(len(c) for _, c in scores) for row, scores in zip(rows, wanted, strict=True))
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": width - first} if few else {}
    logits = model(input_ids=ids.to(model.device), use_cache=False, **options).logits
    offset = width - logits.shape[1]
    scored = []
    for number, (row, continuations) in enumerate(zip(rows, wanted, strict=True)):
        for index, continuation in continuations:
            end = len(row) - offset
            predicted = torch.log_softmax(logits[number, end - len(continuation) : end].float(), -1)
            targets = torch.tensor(continuation, device=predicted.device)
            value = predicted.gather(1, targets[:, None]).sum(dtype=torch.float64)
            scored.append((index, (float(value), bool((predicted.argmax(-1) == targets).all()))))
    return scored
