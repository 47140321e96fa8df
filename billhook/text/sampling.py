"""Where windows begin, and two ways to draw calibration windows from documents: packed, or as in the published code."""

import random
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.errors import BillhookError

BOS = ("auto", "yes", "no")  # whether windows begin with the BOS token
POOL = 4  # packed: tokens to draw from, as a multiple of those needed
_MISSES = 256  # papers: consecutive draws of too short documents before checking whether there is a long one
_BATCH = 64  # documents tokenized at once


def habit(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself."""
    (plain,), (whole,) = _encode(tokenizer, ["a"], add_special_tokens=False), _encode(tokenizer, ["a"])
    starts = range(len(whole) - len(plain) + 1)
    # an empty `plain`, of a tokenizer that knows no "a", is found behind all special tokens
    return whole[: next((k for k in reversed(starts) if plain == whole[k : k + len(plain)]), 0)]


def window_prefix(tokenizer: Tokenizer, bos: str, sampling: str = "packed") -> tuple[int, ...]:
    """The tokens with which every window begins: the BOS token or, of some tokenizers, several; () for none.

    `bos` "auto" follows the tokenizer, but for `sampling` "papers" means none. Raises BillhookError for "yes" where the
    tokenizer has no BOS token and puts nothing before a text.
    """
    if bos not in BOS:
        raise BillhookError(f"Unknown bos {bos!r}: use {', '.join(BOS)}.")
    if bos == "no" or (bos == "auto" and sampling == "papers"):
        return ()
    found = habit(tokenizer)
    if bos == "yes" and not found:
        if tokenizer.bos_token_id is None:
            raise BillhookError("The tokenizer has no BOS token for windows to begin with: leave out --bos.")
        found = [tokenizer.bos_token_id]
    return tuple(found)


def cut(ids: list[int], length: int, prefix: Sequence[int]) -> list[slice]:
    """Parts of `ids` that follow each other, one for each window of `join`; what is left at the end fills no window.

    Raises BillhookError for windows that hold no more than the prefix.
    """
    _check_room(length, prefix)
    begin, parts, start = list(prefix), list[slice](), 0

    def missing() -> int:
        """How many tokens of the prefix are not at `start` already, as where a document begins with them."""
        return next(n for n in range(len(begin) + 1) if begin[n:] == ids[start : start + len(begin) - n])

    while (stop := start + length - missing()) <= len(ids):
        parts.append(slice(start, stop))
        start = stop
    return parts


def join(ids: list[int], parts: Sequence[slice], length: int, prefix: Sequence[int]) -> Tensor:
    """Windows int64 [parts, length]: each part after the tokens of the prefix that it lacks."""
    rows = ([*prefix[: length - (part.stop - part.start)], *ids[part]] for part in parts)
    return torch.tensor(list(rows), dtype=torch.int64)


def papers(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    shape: tuple[int, int],
    rng: random.Random,
    source: str,
    prefix: Sequence[int] = (),
    *,
    held_out: int = 0,
) -> Tensor:
    """Windows int64 [samples, length] drawn as in the published code of Wanda, SparseGPT, GBLM, AlphaPruning and ATP.

    Each begins with `prefix`. Up to `held_out` windows of other documents follow.

    Raises BillhookError if no document is longer than a window.
    """
    samples, length = shape
    _check_room(length, prefix)
    special = {"add_special_tokens": False} if prefix else {}
    cache: dict[int, list[int]] = {}

    def encoded(index: int) -> list[int]:
        if index not in cache:
            cache[index] = _encode(tokenizer, [texts[index]], **special)[0]
        return cache[index]

    def window(ids: list[int]) -> list[int]:
        start = rng.randint(0, len(ids) - length - 1)
        return [*prefix, *ids[start : start + length]][:length]

    rows: list[list[int]] = []
    used = set[int]()
    misses, exists = 0, False
    while len(rows) < samples:
        index = rng.randint(0, len(texts) - 1)
        ids = encoded(index)
        if len(ids) > length:
            rows.append(window(ids))
            used.add(index)
            misses = 0
            continue
        misses += 1
        if misses >= _MISSES and not exists:
            exists = any(len(encoded(index)) > length for index in range(len(texts)))
            if not exists:
                found = f"{len(texts)} documents, the longest has {max(map(len, cache.values()))}"
                wrong = f"No document of {source} is longer than {length} tokens ({found})"
                raise BillhookError(f"{wrong}: use a smaller --length, or leave out --published.")
    for index in rng.sample(range(len(texts)), min(len(texts), 4 * _MISSES)) if held_out else ():
        if len(rows) < samples + held_out and index not in used and len(encoded(index)) > length:
            rows.append(window(encoded(index)))
    return torch.tensor(rows, dtype=torch.int64)


def packed(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    shape: tuple[int, int],
    rng: random.Random,
    source: str,
    *,
    prefix: Sequence[int] = (),
    fewer: bool = False,
    held_out: int = 0,
) -> Tensor:
    """Windows int64 [samples, length] of documents in random order, each after `prefix` (else a BOS or EOS token).

    Windows do not overlap, and each begins with `prefix`, too. Raises BillhookError for a text that is too short; with
    `fewer`, it gives fewer windows. Up to `held_out` further windows follow.
    """
    samples, length = shape
    if isinstance(texts, Sequence):
        order, several = rng.sample(range(len(texts)), len(texts)), texts
        texts = (several[index] for index in order)  # one by one: a chat is written when it is read
    special = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    start = list(prefix) or special[:1]
    pool: list[int] = []
    count = 0
    reader = iter(texts)
    while batch := list(islice(reader, _BATCH)):
        for ids in _encode(tokenizer, batch, add_special_tokens=False):
            # a chat template may write it, too
            pool += ids if ids[: len(start)] == start else start + ids
            count += 1
        if len(pool) >= POOL * samples * length:
            break
    parts = cut(pool, length, prefix)
    samples = min(samples, max(len(parts), 1)) if fewer else samples
    if len(parts) < samples:
        raise BillhookError(
            f"{source} is too short: {samples} windows of {length} need {samples * length} tokens, it has {len(pool)} "
            f"in {count} document{'s' if count != 1 else ''}. Give more text, or smaller --samples or --length."
        )
    chosen = rng.sample(parts, samples)
    starts = {part.start for part in chosen}
    left = [part for part in parts if part.start not in starts]
    return join(pool, [*chosen, *rng.sample(left, min(held_out, len(left)))], length, prefix)


def _check_room(length: int, prefix: Sequence[int]) -> None:
    if length <= len(prefix):
        found = f"Windows of {length} tokens have no room for text after the {len(prefix)} with which they begin"
        raise BillhookError(f"{found}: give a larger length.")


def _encode(tokenizer: Tokenizer, texts: list[str], **options: Any) -> list[list[int]]:
    # verbose=False: no warning of a text longer than the model's context, which is cut into windows
    found: list[list[int]] = tokenizer(texts, verbose=False, return_attention_mask=False, **options)["input_ids"]
    return found
