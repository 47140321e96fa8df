"""Token windows for calibration and evaluation, from any SOURCE of `billhook.text.corpus`.

Calibration draws `samples` windows of `length` tokens with a seed, in one of two named ways:

* "packed" (default): documents in random order, each after a BOS (else EOS) token, are concatenated and cut into
  windows, which are drawn without replacement. Works for documents of any length and for a single text file. A large
  corpus is read until there are four times as many tokens as needed.
* "papers": the published sampling of Wanda, SparseGPT, GBLM, AlphaPruning and ATP: draw documents uniformly until one
  is longer than the window, then a uniform start. The draws equal the published ones for the same corpus, tokenizer and
  seed.

For evaluation the whole text is tokenized once (documents joined by `corpus.joint`) and cut into non-overlapping
windows. The `tokens` [samples, length] of a .safetensors source are used without sampling: at most `samples` rows and
`length` columns.
"""

import hashlib
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.ambient import pinned
from billhook.errors import BillhookError
from billhook.text.corpus import documents, existing_file, joint
from billhook.text.sampling import packed, papers

_STREAM_WINDOWS = 256  # evaluation on a streamed dataset, as the papers do on C4


@dataclass(frozen=True)
class Tokens:
    """Calibration windows: `ids` int64 [samples, length], and their `digest`."""

    ids: Tensor
    source: str
    digest: str
    sampling: str


@dataclass(frozen=True)
class Windows:
    """Evaluation windows: `ids` int64 [windows, length].

    `tokens` is the number of tokens of the text. `text_bytes` is the UTF-8 length of the text of the scored tokens (all
    but the first of each window), or None if unknown (token files, tokenizers without offsets).
    """

    ids: Tensor
    source: str
    digest: str
    tokens: int
    text_bytes: int | None


@pinned
def load_calibration(
    source: str,
    tokenizer: Tokenizer | None,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    sampling: str = "packed",
    vocab_size: int | None = None,
    fewer: bool = False,
) -> Tokens:
    """Draw calibration windows, int64 [samples, length]; with `fewer`, a short text gives fewer windows.

    Raises BillhookError if the text is missing, empty or too short, no document is long enough, a token file is
    damaged, or an id is outside `vocab_size`.
    """
    if samples < 1 or length < 2:
        given = f"got samples={samples}, length={length}"
        raise BillhookError(f"Calibration needs at least 1 sample of at least 2 tokens, {given}.")
    if sampling not in ("packed", "papers"):
        raise BillhookError(f"Unknown sampling {sampling!r}: use packed or papers.")
    if source.endswith(".safetensors"):
        ids, sampling = _token_file(source)[:samples, :length], "as given"
    else:
        words = _need(tokenizer, source)
        if sampling == "papers":
            several = cast(Sequence[str], documents(source, "calibration", stream=False))
            ids = papers(several, words, (samples, length), random.Random(seed), source)
        else:
            texts = documents(source, "calibration", stream=True)
            ids = packed(texts, words, (samples, length), random.Random(seed), source, fewer=fewer)
    check_ids(ids, vocab_size, source)
    return Tokens(ids, source, digest(ids), sampling)


@pinned
def load_windows(
    source: str, tokenizer: Tokenizer | None, *, length: int, limit: int | None = None, vocab_size: int | None = None
) -> Windows:
    """Read non-overlapping evaluation windows, int64 [floor(tokens / length), length], at most `limit` of them.

    The text is tokenized once, so that special tokens are at its start only. The default `limit` is 256 for a hub
    dataset, none for other sources. Raises BillhookError as `load_calibration` does.
    """
    if length < 2 or (limit is not None and limit < 1):
        given = f"got length={length}, limit={limit}"
        raise BillhookError(f"Evaluation needs at least one window of at least 2 tokens, {given}.")
    if source.endswith(".safetensors"):
        ids = _token_file(source)[:limit, :length].contiguous()
        tokens, text_bytes = ids.numel(), None
    else:
        limit = _STREAM_WINDOWS if limit is None and source.startswith("hub:") else limit
        words, needed = _need(tokenizer, source), limit and limit * length
        flat, ends = _encode_joined(documents(source, "evaluation", stream=True), words, needed, joint(source))
        tokens, count = len(flat), min(len(flat) // length, limit or len(flat))
        if not count:
            few = f"{source} has {tokens} tokens, fewer than one window of {length}"
            raise BillhookError(f"{few}: give more text or a smaller length.")
        ids = torch.tensor(flat[: count * length], dtype=torch.int64).view(count, length)
        text_bytes = None if ends is None else int((ends[length - 1 :: length][:count] - ends[::length][:count]).sum())
    check_ids(ids, vocab_size, source)
    return Windows(ids, source, digest(ids), tokens, text_bytes)


def whole_ids(tokens: Any, source: str) -> Tensor:
    """Token ids as int64 [samples, length]; raises BillhookError for another shape or type, or an empty tensor."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        found = str(list(tokens.shape)) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise BillhookError(f"{source}: `tokens` must be [samples, length] with length 2 or more, found {found}.")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise BillhookError(f"{source}: `tokens` must be whole numbers, found {tokens.dtype}.")
    whole = tokens.to(torch.int64)
    return whole.clone() if whole.is_inference() else whole  # which could not be used in a backward pass


def digest(ids: Tensor) -> str:
    """SHA-256 of token ids [rows, columns]: the shape, then the values, all as little-endian int64."""
    shape = np.array(ids.shape, dtype="<i8").tobytes()
    return hashlib.sha256(shape + ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def check_ids(ids: Tensor, vocab_size: int | None, source: str) -> None:
    """Raise BillhookError for the first of `ids` [rows, columns] outside [0, `vocab_size`) (None: no upper limit)."""
    outside = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        known = "" if vocab_size is None else f" of {vocab_size} entries"
        found = f"token id {int(ids[row, column])} at row {row}, position {column}"
        hint = "Is this text tokenized for another model?"
        raise BillhookError(f"{source}: {found} is outside the vocabulary{known}. {hint}")


def _need(tokenizer: Tokenizer | None, source: str) -> Tokenizer:
    if tokenizer is None:
        instead = "give a .safetensors file with `tokens` [samples, length]"
        raise BillhookError(f"The model has no tokenizer to read {source} with: {instead}.")
    return tokenizer


def _token_file(source: str) -> Tensor:
    path = existing_file(source)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if "tokens" not in names:
                raise BillhookError(f"{source} has no tensor `tokens`; it has {', '.join(names[:5]) or 'none'}.")
            tokens: Tensor = file.get_tensor("tokens")
    except (SafetensorError, OSError) as error:
        raise BillhookError(f"{source} is not a safetensors file: {error}") from None
    return whole_ids(tokens, source)


def _encode_joined(
    texts: Iterable[str], tokenizer: Tokenizer, needed: int | None, between: str
) -> tuple[list[int], np.ndarray | None]:
    """Tokenize documents joined by `between`: the ids, and the number of bytes of the text up to the end of each token.

    With `needed`, only as much text is read as gives that many tokens and some more, which cannot change them.
    """
    reader, parts, held = iter(texts), list[str](), 0
    wanted = sys.maxsize if needed is None else 8 * needed
    while True:
        while held < wanted and (piece := next(reader, None)) is not None:
            parts.append(piece)
            held += len(piece) + len(between)
        text = between.join(parts)[:wanted]
        found = tokenizer(text, verbose=False, return_attention_mask=False, return_offsets_mapping=tokenizer.is_fast)
        if held < wanted or (needed is not None and len(found["input_ids"]) >= needed + 64):
            break
        wanted *= 2
    return found["input_ids"], _byte_ends(text, found["offset_mapping"]) if tokenizer.is_fast else None


def _byte_ends(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """The number of bytes of `text` up to the end of each token, from the tokens' (start, end) characters.

    A character that is split over tokens counts for the first of them; text that a tokenizer drops, for the next token.
    """
    letters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (letters >= 0x80) + (letters >= 0x800) + (letters >= 0x10000).astype(np.int64)
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    return np.concatenate([[0], np.cumsum(widths)])[ends]
