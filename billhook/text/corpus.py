"""From a SOURCE to a list of documents, without torch.

FILE.txt                        one document, the whole file (UTF-8)
FILE.jsonl                      one document a line, its field `text`
FILE.safetensors                token ids, see `billhook.text.windows`
hub:NAME[:config][:split]       a dataset of the Hugging Face hub or a local directory; hub:wikitext2, hub:c4 and
                                hub:ptb are those of the papers
stdlib:train, stdlib:heldout    the sources of the running Python's standard library
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from billhook.errors import BillhookError
from billhook.text.rows import checked, warn_of_nulls
from billhook.text.stdlib import documents as stdlib_documents

Purpose = Literal["calibration", "evaluation"]
FORMS = "FILE.txt, FILE.jsonl, FILE.safetensors, hub:NAME[:config][:split], stdlib:train or stdlib:heldout"


def documents(source: str, purpose: Purpose, stream: bool) -> Iterable[str]:
    """The documents of a text source, a sequence; with `stream`, an iterable for a hub dataset.

    `purpose` decides the default split of a hub dataset: train for calibration, held-out text for evaluation. Raises
    BillhookError for an unknown form, and for a file that is missing, empty, not UTF-8 or not of its suffix's type.
    """
    if source.startswith("hub:"):
        from billhook.text.hub import hub_documents

        return hub_documents(source, purpose, stream)
    if source.startswith("stdlib:"):
        return _stdlib(source)
    path = existing_file(source)
    if path.suffix == ".txt":
        return [_read(path)]
    if path.suffix == ".jsonl":
        return _jsonl(path)
    raise BillhookError(f"Cannot read text from {source}. The forms are: {FORMS}.")


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
    if path.is_dir():
        raise BillhookError(f"{source} is a directory, a text source is a file: {FORMS}.")
    if path.suffix not in (".txt", ".jsonl", ".safetensors"):
        raise BillhookError(f"Unknown text source {source!r}. The forms are: {FORMS}.")
    if not path.is_file():
        raise BillhookError(f"There is no file {source}. A text source is {FORMS}.")
    return path


def _stdlib(source: str) -> list[str]:
    split = source.removeprefix("stdlib:")
    if split not in ("train", "heldout"):
        raise BillhookError(f"Unknown text source {source!r}: use stdlib:train or stdlib:heldout.")
    return [text for _, text in stdlib_documents(split)]  # type: ignore[arg-type]


def _read(path: Path) -> str:
    try:
        # reading as text would change line ends, and with them the tokens
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BillhookError(f"Cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise BillhookError(f"{path} is not UTF-8 text (byte {error.start}): convert it first.") from None
    if not text.strip():
        raise BillhookError(f"{path} is empty: give a text with something in it.")
    return text


def _jsonl(path: Path) -> list[str]:
    """The documents of a file of json lines; a null `text` is skipped."""
    found, nulls = [], 0
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BillhookError(f"{path}, line {number} is not valid json ({error}).") from None
        if not isinstance(item, dict) or "text" not in item:
            form = 'every line must be an object like {"text": "..."}'
            raise BillhookError(f"{path}, line {number} has no field `text`: {form}.")
        if item["text"] is None:
            nulls += 1
            continue
        # half of a surrogate pair is legal json, but tokenizers refuse it
        text = checked(item["text"], f"{path}, line {number}")
        found.append(text.encode("utf-8", "replace").decode("utf-8"))
    warn_of_nulls(nulls, str(path))
    if not any(text.strip() for text in found):
        raise BillhookError(f"{path} is empty: give a text with something in it.")
    return found
