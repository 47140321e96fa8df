"""Log-likelihood of continuations after contexts: what zero-shot tasks and word perplexity are made of.

The rules are those of lm-evaluation-harness, so that the numbers are too: spaces at the end of a context belong to the
continuation; context and continuation are tokenised together and split after as many tokens as the context alone has;
an empty context is the BOS (else EOS) token; what is longer than the model's context loses its beginning. Requests that
read the same tokens are run once.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from billhook.engine.capture import evaluating
from billhook.errors import BillhookError, JobError
from billhook.evaluation.batching import batch_size, halving
from billhook.text.windows import check_ids


@dataclass(frozen=True)
class TokenRequest:
    """Token ids: score `continuation` (at least one) after `context` (at least one)."""

    context: list[int]
    continuation: list[int]

    def inputs(self, longest: int) -> tuple[int, ...]:
        """What the model reads: everything but the last token, cut from the left to `longest`."""
        return tuple((self.context + self.continuation)[-(longest + 1) :][:-1])


def encode_request(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> TokenRequest:
    """Tokenise one request; raises BillhookError where the continuation has no token of its own."""
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


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a text that has nothing before it: BOS, else EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise BillhookError("The tokenizer has neither a BOS nor an EOS token, which an empty context needs.")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool | None = None) -> list[int]:
    # a text that begins with the BOS token gets no second one
    begun = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    options = {"add_special_tokens": False} if begun or special is False else {}
    found: list[int] = tokenizer(text, verbose=False, return_attention_mask=False, **options)["input_ids"]
    return found


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[TokenRequest],
    longest: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, bool]]:
    """For each request the log-likelihood (nats) of its continuation, and whether the model itself would say it, token
    by token.

    `longest` is the most tokens to read at once. Raises
    BillhookError for ids outside the vocabulary and continuations longer than `longest`, JobError for a result that is
    no number.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        if len(request.continuation) > longest:
            raise BillhookError(
                f"A continuation of {len(request.continuation)} tokens exceeds the model's context of {longest}."
            )
        groups.setdefault(request.inputs(longest), []).append(index)
    rows = sorted(groups, key=lambda row: (-len(row), row))
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    check_ids(
        torch.tensor([sorted({t for r in requests for t in (*r.context, *r.continuation)})]),
        weight.shape[0],
        "the requests",
    )
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    start = 0
    with evaluating(model):
        while start < len(rows):
            part = rows[start : start + batch_size(len(rows[start]), weight.shape[0], model.dtype.itemsize)]

            def work(first: int, last: int, part: list[tuple[int, ...]] = part) -> list[tuple[int, tuple[float, bool]]]:
                chosen = part[first:last]
                return _score(model, chosen, [[(i, requests[i].continuation) for i in groups[row]] for row in chosen])

            for _, _, scored in halving(len(part), len(part), work):
                for index, value in scored:
                    found[index] = value
            start += len(part)
            if progress is not None:
                progress(start, len(rows))
    if any(value != value for value, _ in found):
        raise JobError("The model's predictions are not finite numbers: its weights are damaged.")
    return found


def _score(
    model: PreTrainedModel, rows: Sequence[tuple[int, ...]], wanted: Sequence[Sequence[tuple[int, list[int]]]]
) -> list[tuple[int, tuple[float, bool]]]:
    """Run rows of token ids, padded on the right, and read off what is wanted at the end of each."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    # Causal attention: what stands right of a row's end changes nothing in it. Only the positions that are asked for
    # are predicted.
    first = min(len(row) - max(len(c) for _, c in asked) for row, asked in zip(rows, wanted, strict=True))
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(
        input_ids=ids.to(model.device), use_cache=False, **({"logits_to_keep": width - first} if few else {})
    ).logits
    offset = width - logits.shape[1]
    scored = []
    for place, (row, asked) in enumerate(zip(rows, wanted, strict=True)):
        for index, continuation in asked:
            end = len(row) - offset
            predicted = torch.log_softmax(logits[place, end - len(continuation) : end].float(), -1)
            targets = torch.tensor(continuation, device=predicted.device)
            value = predicted.gather(1, targets[:, None]).sum(dtype=torch.float64)
            scored.append((index, (float(value), bool((predicted.argmax(-1) == targets).all()))))
    return scored
