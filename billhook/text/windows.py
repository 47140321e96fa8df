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

A model that was trained with a BOS token before its text predicts badly without one. With `bos` "auto", every window
begins with the BOS token if the tokenizer puts one before a text by itself; "yes" and "no" decide otherwise. The BOS
token is the first of the `length` tokens and is never predicted, so that every other token of the text is scored once.
A tokenizer may put several tokens before a text, or one that it does not name as BOS token: these are treated alike.
With "no", as in the published code of the papers, the first token of a window is one of the text and is not scored,
and a BOS token that the tokenizer adds is at the beginning of the whole text only. "papers" sampling means "no" unless
`bos` is "yes".
"""

import hashlib
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.ambient import pinned
from billhook.errors import BillhookError
from billhook.text.chat import chat_of
from billhook.text.corpus import documents, existing_file, is_token_file, joint
from billhook.text.given import Given, given, whole_ids
from billhook.text.sampling import BOS, cut, join, packed, papers, window_prefix

GIVEN, TEXTS = "given as a tensor", "given as texts"  # names of sources
_STREAM_WINDOWS = 256  # evaluation on a streamed dataset, as the papers do on C4


@dataclass(frozen=True)
class Tokens:
    """Calibration windows: `ids` int64 [samples, length], their `digest`, whether each begins with the BOS token (None
    for tokens that were given), `heldout` windows of the same text (None if it has no more), and the tokens of the
    `prefix` with which each begins."""

    ids: Tensor
    source: str
    digest: str
    sampling: str
    bos: bool | None = None
    heldout: Tensor | None = None
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True)
class Windows:
    """Evaluation windows: `ids` int64 [windows, length].

    `tokens` is the number of tokens of the text. `text_bytes` is the UTF-8 length of the text of the scored tokens (all
    but the prefix, or the first, of each window), or None if unknown (token files, tokenizers without offsets). `bos`
    and `prefix` are as in `Tokens`.
    """

    ids: Tensor
    source: str
    digest: str
    tokens: int
    text_bytes: int | None
    bos: bool | None = None
    prefix: tuple[int, ...] = ()


@pinned
def load_calibration(
    source: Given,
    tokenizer: Tokenizer | None,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    sampling: str = "packed",
    bos: str = "auto",
    vocab_size: int | None = None,
    fewer: bool = False,
    held_out: int = 0,
) -> Tokens:
    """Draw calibration windows, int64 [samples, length]; with `fewer`, a short text gives fewer windows.

    Up to `held_out` further windows are drawn that have nothing in common with these, if the text is long enough.

    `source` is the name of a source or data (`billhook.text.given`). Raises BillhookError if the text is missing, empty
    or too short, no document is long enough, a token file is damaged, or an id is outside `vocab_size`.
    """
    if samples < 1 or length < 2:
        wrong = f"got samples={samples}, length={length}"
        raise BillhookError(f"Calibration needs at least 1 sample of at least 2 tokens, {wrong}.")
    if sampling not in ("packed", "papers"):
        raise BillhookError(f"Unknown sampling {sampling!r}: use packed or papers.")
    chat = chat_of(tokenizer)
    data = given(source, chat)
    name = data if isinstance(data, str) else GIVEN if isinstance(data, Tensor) else TEXTS
    begun, prefix = None, tuple[int, ...]()
    if isinstance(data, Tensor) or is_token_file(name):
        _check_unused(bos, name)
        ids = data if isinstance(data, Tensor) else _token_file(name)[: samples + held_out, :length]
        sampling = "given" if isinstance(data, Tensor) else "as given"
    else:
        words, rng, shape = _need(tokenizer, name), random.Random(seed), (samples, length)
        published, prefix = sampling == "papers", window_prefix(words, bos, sampling)
        texts = documents(data, "calibration", not published, chat) if isinstance(data, str) else data
        if published:
            several = texts if isinstance(texts, Sequence) else list(texts)
            ids = papers(several, words, shape, rng, name, prefix, held_out=held_out)
        else:
            ids = packed(texts, words, shape, rng, name, prefix=prefix, fewer=fewer, held_out=held_out)
        begun = bool(prefix)
    check_ids(ids, vocab_size, name)
    taken = len(ids) if isinstance(data, Tensor) else samples
    heldout = ids[taken:] if len(ids) > taken else None
    return Tokens(ids[:taken], name, digest(ids[:taken]), sampling, bos=begun, heldout=heldout, prefix=prefix)


@pinned
def load_windows(
    source: str,
    tokenizer: Tokenizer | None,
    *,
    length: int,
    limit: int | None = None,
    bos: str = "auto",
    vocab_size: int | None = None,
) -> Windows:
    """Read non-overlapping evaluation windows, int64 [windows, length], at most `limit` of them.

    The text is tokenized once. The default `limit` is 256 for a hub dataset, none for other sources. Raises
    BillhookError as `load_calibration` does.
    """
    if length < 2 or (limit is not None and limit < 1):
        wrong = f"got length={length}, limit={limit}"
        raise BillhookError(f"Evaluation needs at least one window of at least 2 tokens, {wrong}.")
    if is_token_file(source):
        _check_unused(bos, source)
        ids = _token_file(source)[:limit, :length].contiguous()
        tokens, text_bytes, begun, prefix = ids.numel(), None, None, tuple[int, ...]()
    else:
        limit = _STREAM_WINDOWS if limit is None and source.startswith("hub:") else limit
        words, needed = _need(tokenizer, source), limit and limit * length
        prefix = window_prefix(words, bos)
        texts = documents(source, "evaluation", True, chat_of(words))
        flat, ends = _encode_joined(texts, words, needed, joint(source))
        tokens, parts, begun = len(flat), cut(flat, length, prefix)[:limit], bool(prefix)
        if not parts:
            few = f"{source} has {tokens} tokens, fewer than one window of {length}"
            raise BillhookError(f"{few}: give more text or a smaller length.")
        ids = join(flat, parts, length, prefix)
        text_bytes = None
        if ends is not None:
            before, scored = np.concatenate([[0], ends]), length - max(1, len(prefix))
            text_bytes = sum(int(before[part.stop] - before[part.stop - scored]) for part in parts)
    check_ids(ids, vocab_size, source)
    return Windows(ids, source, digest(ids), tokens=tokens, text_bytes=text_bytes, bos=begun, prefix=prefix)


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
        file = "give a .safetensors file with `tokens` [samples, length]"
        what, instead = ("texts", "give token ids [windows, length]") if source == TEXTS else (source, file)
        raise BillhookError(f"The model has no tokenizer to read {what} with: {instead}.")
    return tokenizer


def _check_unused(bos: str, source: str) -> None:
    """Raise BillhookError where a BOS token is asked for and the tokens are given."""
    if bos not in BOS or bos == "yes":
        raise BillhookError(f"bos={bos}: the tokens of {source} are used as they are, so it must be auto or no.")


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
