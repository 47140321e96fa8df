"""From a SOURCE to a list of documents, without torch.

FILE.txt                        one document, the whole file (UTF-8)
FILE.jsonl, FILE.json           one document a line or an element, its field `text`, or else `messages`
FILE.csv, FILE.parquet          one document a row, its column `text`, or else `messages`; read by `datasets`
FILE.txt.gz, FILE.jsonl.gz, ... the same, compressed
FOLDER                          written by `save_to_disk` of `datasets`
FILE.safetensors                token ids, see `billhook.text.windows`
hub:NAME[:config][:split]       a dataset of the Hugging Face hub or a local directory; hub:wikitext2, hub:c4 and
                                hub:ptb are those of the papers
stdlib:train, stdlib:heldout    the sources of the running Python's standard library
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from billhook.errors import BillhookError
from billhook.text.hub import dataset_documents, hub_documents, is_saved_dataset
from billhook.text.rows import FORM, Chat, fields_of, no_text, row_document, warn_of_nulls
from billhook.text.stdlib import documents as stdlib_documents

Purpose = Literal["calibration", "evaluation"]
FORMS = "FILE.txt, FILE.jsonl, FILE.safetensors, hub:NAME[:config][:split], stdlib:train or stdlib:heldout"
_TEXT, _ROWS = (".txt", ".jsonl", ".json"), (".csv", ".parquet")  # read here, and by `datasets`; .gz may follow
_MORE = f"A file may also be {', '.join((*_TEXT[2:], *_ROWS))}, or end in .gz."

_LONGEST = 255  # bytes of a file's name


def documents(source: str, purpose: Purpose, stream: bool, chat: Chat | None = None) -> Iterable[str]:
    """The documents of a text source, a sequence; with `stream`, an iterable for a hub dataset.

    `purpose` decides the default split of a hub dataset: train for calibration, held-out text for evaluation. `chat`
    writes `messages` as text. Raises BillhookError for an unknown form, and for a file that is missing, empty, not
    UTF-8 or not of its suffix's type.
    """
    if source.startswith("hub:"):
        return hub_documents(source, purpose, stream, chat)
    if source.startswith("stdlib:"):
        return _stdlib(source)
    path = Path(source).expanduser()
    if any(len(part.encode(errors="replace")) > _LONGEST for part in path.parts):
        raise BillhookError(f"{source[:40]!r}... is longer than a file's name. Give a text itself in a list of texts.")
    if is_saved_dataset(path) or _kind(path) in _ROWS:
        return dataset_documents(path, _kind(path), purpose, stream, chat)
    path = existing_file(source)
    return [read_text(path)] if _kind(path) == ".txt" else _json(path, chat)


def joint(source: str) -> str:
    """The separator of documents that are read as one text: as published, a space for C4 and the Penn Treebank."""
    return " " if source.split(":")[:2] in (["hub", "c4"], ["hub", "ptb"]) else "\n\n"


def source_name(source: str) -> str:
    """A SOURCE as it may be published: files and local directories without their folder."""
    kind = next((kind for kind in ("hub:", "self:") if source.startswith(kind)), "")
    rest = source.removeprefix(kind)
    local = kind != "hub:" or rest.startswith(("/", "~", "."))
    return kind + (Path(rest).name if local else rest)


def existing_file(source: str) -> Path:
    """The file that `source` names; raises BillhookError, listing the forms of a source, if there is none."""
    path = Path(source).expanduser()
    if not source:
        raise BillhookError(f"The name of the text source is empty: is a variable of the shell unset? Give {FORMS}.")
    if source.startswith("self:"):
        who = "is text that the model writes, for the --calibration of models that continue text"
        raise BillhookError(f"{source} {who}: give {FORMS}.")
    if path.is_dir():
        found = f"{source} is a directory, and not one that save_to_disk of `datasets` wrote"
        raise BillhookError(f"{found}: give one of its files, or hub:{source} if they are a dataset.")
    if _kind(path) not in (*_TEXT, *_ROWS, ".safetensors"):
        raise BillhookError(f"Unknown text source {source!r}. The forms are: {FORMS}. {_MORE}")
    if not path.is_file():
        raise BillhookError(f"There is no file {source}. A text source is {FORMS}.")
    return path


def is_token_file(source: str) -> bool:
    """Whether a SOURCE is a file of token ids."""
    return source.lower().endswith(".safetensors")


def _kind(path: Path) -> str:
    """The last suffix of a name, without .gz, in lower case."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _stdlib(source: str) -> list[str]:
    split = source.removeprefix("stdlib:")
    if split not in ("train", "heldout"):
        raise BillhookError(f"Unknown text source {source!r}: use stdlib:train or stdlib:heldout.")
    return [text for _, text in stdlib_documents(split)]  # type: ignore[arg-type]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, perhaps compressed (.gz), without a byte order mark and with its own line ends.

    Raises BillhookError for a file that cannot be read, is not UTF-8, or is empty.
    """
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        # decoding as a text file would change line ends, and with them the tokens
        text = data.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BillhookError(f"{path} is not a complete gzip file ({error}).") from None
    except OSError as error:
        raise BillhookError(f"Cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise BillhookError(f"{path} is not UTF-8 text (byte {error.start}): convert it first.") from None
    if not text.strip():
        raise BillhookError(f"{path} is empty: give a text with something in it.")
    return text


def _json(path: Path, chat: Chat | None) -> list[str]:
    """The documents of a file of json lines, or of a json array; a null is skipped."""
    every = []
    for where, item in _items(path):
        fields = fields_of(item) if isinstance(item, dict) else ()
        if not fields:
            raise BillhookError(f"{where} has no field `text` or `messages`: every one must be an object like {FORM}.")
        every.append(row_document(item, fields, where, chat))
    found = [text for text in every if text is not None]
    warn_of_nulls(len(every) - len(found), str(path))
    if not any(text.strip() for text in found):
        raise no_text(str(path))
    return found


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each item is, and the item."""
    text = read_text(path)
    if _kind(path) == ".json" and text.lstrip().startswith("["):
        for number, item in enumerate(parsed(text, str(path)), start=1):
            yield f"{path}, row {number}", item
        return
    whole = None
    if _kind(path) == ".json":
        with suppress(ValueError, RecursionError):  # of lines with an object each
            whole = json.loads(text)
    if whole is not None:
        yield str(path), whole
        return
    for where, line in lines(path, text):
        yield where, parsed(line, where)


def lines(path: Path, text: str | None = None) -> Iterator[tuple[str, str]]:
    """Where each line of a file (or of its `text`) is that is not empty, and the line; raises as `read_text` does.

    Only \\n ends a line: strings in JSON may have other characters at which `str.splitlines` splits.
    """
    for number, line in enumerate((read_text(path) if text is None else text).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def parsed(text: str, where: str) -> Any:
    """The value of a text in JSON; raises BillhookError naming `where` it was found."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BillhookError(f"{where} is not valid json ({error}).") from None
