"""From a SOURCE to questions about pictures, without torch.

FILE.jsonl                      a line an object: {"image": FILE, "question": TEXT, "answer": TEXT}, or
                                {"image": FILE, "messages": [...]} as chat templates read them, the last one being the
                                assistant's answer; several images are a list, files are found beside FILE.jsonl
hub:NAME[:config][:split]       a dataset of the Hugging Face hub or a local one with these columns
rows given from Python          mappings with these fields; an image may be one of Pillow
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.images.corpus import Picture, pillow
from billhook.text.objects import DataRow, objects
from billhook.text.rows import cleaned

FORMS = (
    'FILE.jsonl with lines {"image": FILE, "question": TEXT, "answer": TEXT} or {"image": FILE, "messages": [...]}, or '
    "hub:NAME[:config][:split]"
)


@dataclass(frozen=True)
class Question:
    """Pictures, the `messages` of a chat whose contents are lists of parts, and the answer to the last one."""

    name: str
    pictures: tuple[Picture, ...]
    messages: list[dict[str, Any]]
    answer: str

    @property
    def text(self) -> str:
        """The text of the last message."""
        return "\n".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")


def questions(source: Any, purpose: str) -> list[Question]:
    """The questions of a SOURCE or of rows given from Python.

    Raises BillhookError as `billhook.text.objects` does, and, naming the row, for one without image or answer.
    """
    return [_question(row) for row in objects(source, purpose, FORMS)]


def _question(row: DataRow) -> Question:
    fields, where = row.fields, row.where
    images = fields.get("image", fields.get("images"))
    images = images if isinstance(images, list | tuple) else [] if images is None else [images]
    if not images:
        known = ", ".join(map(str, fields)) or "nothing"
        raise BillhookError(f"{where} has no image (it has {known}), and the model reads images with text.")
    found = tuple(_picture(image, f"{where}, image {n}", row.folder) for n, image in enumerate(images, start=1))
    if "messages" in fields:
        return Question(where, found, *_conversation(fields["messages"], where, len(found)))
    text, answer = row.text("question"), row.text("answer")
    message = {"role": "user", "content": [*_image_parts(len(found)), {"type": "text", "text": text}]}
    return Question(where, found, [message], answer)


def _picture(image: Any, where: str, folder: Path) -> Picture:
    if isinstance(image, str | Path):
        path = folder / Path(image).expanduser()
        if not path.is_file():
            raise BillhookError(f"{where}: there is no file {path}.")
        return Picture(str(path), lambda: pillow().open(path))
    if not hasattr(image, "convert"):
        raise BillhookError(f"{where}: found {type(image).__name__}, not the name of a file or an image of Pillow.")
    return Picture(where, image.copy)


def _image_parts(count: int) -> list[dict[str, Any]]:
    return [{"type": "image"} for _ in range(count)]


def _conversation(messages: Any, where: str, images: int) -> tuple[list[dict[str, Any]], str]:
    """The messages before the answer, with contents as lists of parts, and the answer."""
    if not isinstance(messages, list | tuple) or len(messages) < 2 or not all(isinstance(m, Mapping) for m in messages):
        raise BillhookError(f"{where}: messages must be a list of at least a question and its answer.")
    found: list[dict[str, Any]] = [{"role": str(m.get("role")), "content": _parts(m, where)} for m in messages]
    answer = "".join(part.get("text", "") for part in found[-1]["content"])
    if found[-1]["role"] != "assistant" or not answer.strip():
        raise BillhookError(f"{where}: the last of the messages must be the assistant's, with a text.")
    named = sum(part["type"] == "image" for message in found[:-1] for part in message["content"])
    if not named:
        first = next((message for message in found if message["role"] == "user"), found[0])
        first["content"] = [*_image_parts(images), *first["content"]]
    elif named != images:
        raise BillhookError(f"{where}: its messages show {named} images, and it has {images}.")
    return found[:-1], answer


def _parts(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": cleaned(content)}]
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise BillhookError(f"{where}: the content of a message must be a text or a list of parts.")
    wrong = [part.get("type") for part in content if part.get("type") not in ("text", "image")]
    if wrong or any(not isinstance(part.get("text", ""), str) for part in content):
        raise BillhookError(f"{where}: a part of a message must be a text or an image, found {wrong or 'no text'}.")
    return [{"type": part["type"], **({"text": cleaned(part["text"])} if "text" in part else {})} for part in content]
