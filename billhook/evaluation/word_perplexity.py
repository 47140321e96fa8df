"""Word perplexity, the protocol of lm-evaluation-harness: exp(NLL of all tokens of all documents / number of words).

Each document begins with the BOS (else EOS) token and is cut into windows that begin with the last token of the
previous one; words are separated by white space. The numbers depend on the division into documents and on the window
length, but not on the tokenizer. They are not comparable with token perplexity.

With a BOS token (`billhook.text.sampling`) every window begins with it, and it is never scored. The harness begins only
a document with it, and scores a second one that the tokenizer adds: `bos` "no" gives the harness's number.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.errors import BillhookError
from billhook.evaluation.batching import Progress
from billhook.evaluation.likelihood import TokenRequest, log_likelihoods, prefix_token
from billhook.text.sampling import window_prefix

PROTOCOL = "word perplexity over rolling windows of documents (lm-evaluation-harness)"


@dataclass(frozen=True)
class WordEvaluation:
    """Word perplexity, as lm-evaluation-harness counts it.

    * `protocol` (string): `word perplexity over rolling windows of documents (lm-evaluation-harness)`.
    * `word_ppl`: exp of the negative log-likelihood per word; null if it is too large to be a number.
    * `byte_ppl`: the same per UTF-8 byte.
    * `bits_per_byte`: its logarithm to base 2.
    * `words`: parts between white space.
    * `tokens`: scored tokens: all of every document.
    * `documents`: scored documents.
    * `length`: the largest number of tokens read at once.
    * `source`: the text, as it was named.
    * `bos`: whether every window, and not only every document, begins with the BOS token.
    """

    word_ppl: float | None
    byte_ppl: float
    bits_per_byte: float
    words: int
    tokens: int
    documents: int
    length: int
    source: str
    bos: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The protocol and all fields by name, for json."""
        return {"protocol": PROTOCOL, **asdict(self)}


def evaluate_words(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int,
    source: str,
    progress: Progress | None = None,
    *,
    bos: str = "no",
) -> WordEvaluation:
    """Score whole documents in windows of `length` tokens; raises BillhookError for an empty text."""
    prefix = window_prefix(tokenizer, bos)
    begin = prefix or (prefix_token(tokenizer),)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    octets = sum(len(text.encode()) for text in texts)
    encoded = [
        tokenizer(text, verbose=False, return_attention_mask=False, add_special_tokens=not prefix)["input_ids"]
        for text in texts
    ]
    requests = [request for ids in encoded for request in rolling(ids, begin, length, prefix)]
    if not requests or not octets:
        raise BillhookError(f"{source} is empty: give a text with something in it.")
    total = -sum(value for value, _ in log_likelihoods(model, requests, length, progress=progress))
    per_word = total / words
    return WordEvaluation(
        word_ppl=math.exp(per_word) if per_word < 709 else None,
        byte_ppl=math.exp(min(total / octets, 709)),
        bits_per_byte=total / octets / math.log(2),
        words=words,
        tokens=sum(map(len, encoded)),
        documents=len(texts),
        length=length,
        source=source,
        bos=bool(prefix),
    )


def rolling(ids: Sequence[int], begin: Sequence[int], length: int, prefix: Sequence[int] = ()) -> list[TokenRequest]:
    """Windows that together score every token of `ids` once, each reading at most `length` tokens.

    A document begins after the tokens of `begin`, a later window with `prefix`, or without it with the token before.
    """
    found, step = [], max(1, length + 1 - max(1, len(prefix)))
    for start in range(0, len(ids), step):
        stop = min(start + step, len(ids))
        # the last window is extended to the left, so that it has `length` tokens too
        first = begin if start == 0 else prefix
        before = [*first, *ids[max(0, stop - length - 1 + len(first)) : start]]
        found.append(TokenRequest(before, list(ids[start:stop])))
    return found
