"""The tokenizer of a GGUF file: tokens, their types and scores, merges, special tokens and the chat template.

llama.cpp knows three kinds that matter here: SentencePiece from tokenizer.model; the same algorithm for a
tokenizer.json that spells spaces as ▁ and falls back to bytes; and byte-level BPE, for which the file names one of the
pre-tokenizers that are built into llama.cpp. Two things differ from llama.cpp's converter, for good:

* It recognizes a pre-tokenizer by a digest of the token numbers of one text. Here it is recognized by its rules, so
  that another vocabulary with the same rules is found too.
* Without tokenizer.model it gives every token the same score, with which llama.cpp merges from left to right. Here a
  score is the negative place of the token's first merge, with which llama.cpp merges as tokenizer.json says.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from billhook.errors import BillhookError
from billhook.store.checkpoint import load_tokenizer
from billhook.store.files import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NORMAL, _, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # types of tokens, in GGUF as in SentencePiece
_ADDED = -1000.0  # the score of added tokens
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the rules of a tokenizer.json (regular expressions, "digits", and "words" of ByteLevel) by their name in llama.cpp;
# "llama-bpe" is "dbrx" for a tokenizer that takes words of its vocabulary whole
_PRE_TOKENIZERS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_WORDS % "",): "qwen2",
    (_WORDS % "{1,3}",): "dbrx",
    (_CASED % ("", "", ""),): "tekken",
    (_CASED % (_ENDINGS + "?", _ENDINGS + "?", "{1,3}"),): "gpt-4o",
}
Token = tuple[bytes, float, int]  # text, score, type


def add_tokenizer(writer: "GGUFWriter", source: Path, config: Mapping[str, Any]) -> list[str]:
    """Add the tokenizer of a model directory; returns a note where it has none that llama.cpp can use.

    Raises BillhookError for a tokenizer that has no form in GGUF files.
    """
    size = config["vocab_size"]
    path = source / "tokenizer_config.json"
    settings = read_json(path, "tokenizer configuration") if path.is_file() else {}
    prefix = settings.get("add_prefix_space") if writer.arch in ("llama", "smollm3") else None
    if (source / "tokenizer.model").is_file():
        tokens = _sentencepiece(source / "tokenizer.model", size)
        tokens |= {i: token for i, token in _added(source, settings, writer.arch == "phi3") if i < size}
        _add_scored(writer, source, tokens, size)
        prefix = False if writer.arch in ("gemma2", "gemma3") else prefix
    elif not (source / "tokenizer.json").is_file():
        return _add_none(writer, size, f"{source.name} has no tokenizer")
    elif _is_sentencepiece(facts := read_json(source / "tokenizer.json", "tokenizer")):
        tokens = _from_merges(source, facts)
        if not any(kind == _BYTE for _, _, kind in tokens.values()):
            return _add_none(writer, size, f"The tokenizer of {source.name} has no tokens for single bytes")
        _add_scored(writer, source, tokens, size)
        prefix = prefix if _prepends_space(facts) else False
    elif not facts["model"].get("merges") and facts["model"]["type"] == "BPE":
        return _add_none(writer, size, f"The tokenizer of {source.name} has no merges")
    else:
        _add_byte_level(writer, source, facts, size)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    if writer.arch == "llama" and size == 49152:  # Granite and SmolLM, as the converter does
        writer.add_add_bos_token(False)
    return []


def _add_none(writer: "GGUFWriter", size: int, why: str) -> list[str]:
    writer.add_tokenizer_model("none")
    if f"{writer.arch}.vocab_size" not in writer.kv_data[0]:
        writer.add_vocab_size(size)
    return [f"{why}: with this file llama.cpp can read and write only token numbers."]


def _add_scored(writer: "GGUFWriter", source: Path, tokens: Mapping[int, Token], size: int) -> None:
    """Tokens with scores, for SentencePiece's algorithm."""
    import gguf

    listed = [tokens.get(i, (f"[PAD{i}]".encode(), -10000.0, _UNUSED)) for i in range(size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in listed])
    writer.add_token_scores([score for _, score, _ in listed])
    writer.add_token_types([kind for _, _, kind in listed])
    gguf.SpecialVocab(source, n_vocab=size).add_to_gguf(writer, quiet=True)


def _refused(source: Path, what: str) -> BillhookError:
    advice = "convert it with llama.cpp's convert_hf_to_gguf.py and give that file with --template"
    return BillhookError(f"The tokenizer of {source.name} is {what}, which is not known to llama.cpp: {advice}.")


def _check_bpe(source: Path, facts: Mapping[str, Any]) -> None:
    if facts["model"]["type"] != "BPE":
        raise _refused(source, f"a {facts['model']['type']} model")


def _sentencepiece(path: Path, size: int) -> dict[int, Token]:
    """The tokens of tokenizer.model, a protobuf message whose field 1 repeats (1: text, 2: score, 3: type)."""
    tokens: dict[int, Token] = {}
    for field, piece in _message(path.read_bytes()):
        if field == 1 and len(tokens) < size:
            parts = dict(_message(piece))
            kind = parts.get(3, _NORMAL)
            score: float = struct.unpack("<f", parts.get(2, bytes(4)))[0]
            tokens[len(tokens)] = (bytes(parts.get(1, b"")), score, _NORMAL if kind == _USER else kind)
    return tokens


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an integer or bytes; raises ValueError for a damaged one."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place : place + 1]
            if not byte or shift > 63:
                raise ValueError("the message ends too early")
            place, value, shift = place + 1, value | (byte[0] & 127) << shift, shift + 7
            if byte[0] < 128:
                return value

    while place < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        length = {1: 8, 5: 4}.get(key & 7) or (number() if key & 7 == 2 else len(data))
        if place + length > len(data):
            raise ValueError("the message ends too early")
        yield key >> 3, data[place : place + length]
        place += length


def _added(source: Path, settings: Mapping[str, Any], phi: bool) -> Iterator[tuple[int, Token]]:
    """Tokens that were added to those of tokenizer.model, or change their type."""
    if (source / "added_tokens.json").is_file():
        for text, number in read_json(source / "added_tokens.json", "list of added tokens").items():
            yield number, (text.encode(), _ADDED, _USER)
    listed = {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
    if phi and (source / "tokenizer.json").is_file():
        listed |= {token["id"]: token for token in read_json(source / "tokenizer.json", "tokenizer")["added_tokens"]}
    for number, token in listed.items():
        control = token.get("special") or (not phi and _looks_special(token["content"]))
        text = token["content"] if control or phi else token["content"].replace("▁", " ")
        yield number, (text.encode(), _ADDED, _CONTROL if control else _USER)


def _looks_special(text: str) -> bool:
    """Whether a token is for control though the tokenizer does not say so; the converter's rule."""
    known = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return text in known or bool(re.fullmatch(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>", text, re.DOTALL))


def _is_sentencepiece(facts: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json was made from SentencePiece: its spaces are ▁."""
    rules = str([facts.get("normalizer"), facts.get("pre_tokenizer")])
    return "▁" in rules and "ByteLevel" not in rules


def _prepends_space(facts: Mapping[str, Any]) -> bool:
    rules = str([facts.get("normalizer"), facts.get("pre_tokenizer")])
    return "'Prepend'" in rules or "'first'" in rules or "'always'" in rules


def _from_merges(source: Path, facts: Mapping[str, Any]) -> dict[int, Token]:
    """The tokens of a tokenizer.json made from SentencePiece, with scores in the order of its merges."""
    _check_bpe(source, facts)
    first: dict[str, float] = {}
    for place, merge in enumerate(facts["model"]["merges"]):
        first.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), -float(place))
    tokens = {}
    for text, number in facts["model"]["vocab"].items():
        kind = _BYTE if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text) else _NORMAL
        tokens[number] = (text.encode(), first.get(text, _ADDED), kind)
    for token in facts.get("added_tokens", ()):
        control = token["special"] or _looks_special(token["content"])
        text = token["content"]
        tokens[token["id"]] = (text.encode(), first.get(text, _ADDED), _CONTROL if control else _USER)
    return tokens


def _add_byte_level(writer: "GGUFWriter", source: Path, facts: Mapping[str, Any], size: int) -> None:
    """Tokens as `transformers` reads them; added ones are spelled as they are decoded."""
    import gguf

    _check_bpe(source, facts)
    tokenizer: Any = load_tokenizer(source)
    spelled = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        text, kind = spelled.get(number, f"[PAD{number}]"), _NORMAL if number in spelled else _UNUSED
        if number in added:
            if not added[number].normalized:
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            kind = _CONTROL if added[number].special or _looks_special(text) else _USER
            text = text if kind == _CONTROL else text.replace("▁", " ")
        tokens.append(text)
        kinds.append(kind)
    if spelled and max(spelled) >= size:
        raise BillhookError(f"{source.name} has a token {max(spelled)} where its model knows {size} tokens.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(source, facts))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(source, load_merges=True).add_to_gguf(writer, quiet=True)


def _pre_tokenizer(source: Path, facts: Mapping[str, Any]) -> str:
    rules = []
    given = facts.get("pre_tokenizer") or {}
    for rule in given.get("pretokenizers", [given]):
        if rule.get("type") == "Split":
            rules.append(rule["pattern"].get("Regex", ""))
        elif rule.get("type") == "Digits":
            rules.append("digits" if rule["individual_digits"] else "numbers")
        elif rule.get("type") != "ByteLevel" or rule.get("use_regex", True):
            rules.append("words" if rule.get("type") == "ByteLevel" else str(rule.get("type")))
    name = _PRE_TOKENIZERS.get(tuple(rules))
    if name is None:
        raise _refused(source, f"split by {rules}"[:300])
    return "llama-bpe" if name == "dbrx" and facts["model"].get("ignore_merges") else name
