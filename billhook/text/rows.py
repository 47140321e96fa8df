"""Rows of a source of text: what a document may be, in the field `text` or, where that is missing or null, `messages`.

`messages` are a chat, [{"role": "user", "content": "..."}, ...], which the tokenizer's chat template writes as text;
a content may also be a list of parts {"type": "text", "text": "..."}.
Half of a surrogate pair, which is legal in JSON and Python but which tokenizers refuse, becomes a question mark.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard

from billhook.errors import BillhookError, first_line

Chat = Callable[[list[dict[str, Any]]], str]  # the text of a chat's messages, by a chat template
TEXT, MESSAGES = "text", "messages"
_CHAT = '[{"role": "user", "content": "..."}, ...]'
_PART = '{"type": "text", "text": "..."}'
FORM = f'{{"text": "..."}} or {{"messages": {_CHAT}}}'
_TEMPLATE = "add chat_template.jinja to its directory, or give rows with a field `text`"


def fields_of(names: Collection[str], field: str = TEXT) -> tuple[str, ...]:
    """The fields, of those that a row has, that its document may be in: the first of them that is not null."""
    return tuple(name for name in dict.fromkeys((field, MESSAGES)) if name in names)


def row_document(row: Mapping[str, Any], fields: Collection[str], where: str, chat: Chat | None = None) -> str | None:
    """The document of a row: that in the first of its `fields` that is not null; None where all are. Raises as
    `document` does."""
    field = next((field for field in fields if not is_null(row[field])), None)
    return None if field is None else document(row[field], where, field, chat)


def document(value: Any, where: str, field: str = TEXT, chat: Chat | None = None) -> str | None:
    """The document that the `field` of a row holds; None for null, also as pandas writes it.

    Raises BillhookError, naming `where` the row was found, for a text that is not a string, for messages that are no
    chat or that the chat template refuses, and for a chat without a chat template.
    """
    if is_null(value):
        return None
    if field == MESSAGES:
        return cleaned(_written(value, where, chat))
    if not isinstance(value, str):
        raise BillhookError(f"{where}: the text is of type {type(value).__name__}, not a string.")
    return cleaned(value)


def cleaned(text: str) -> str:
    """The text with a question mark for half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")


def no_text(source: str) -> BillhookError:
    """The error for a source without a document that has more than white space."""
    return BillhookError(f"{source} holds no text: give a source with something in it.")


def warn_of_nulls(count: int, source: str) -> None:
    """Log how many rows of a source were skipped because their text is null."""
    if count:
        logging.getLogger(__name__).warning(
            "note: rows of %s that were skipped because their text is null: %d.", source, count
        )


def is_null(value: Any) -> bool:
    """Whether a value is None, or NaN or NA of pandas."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def _written(messages: Any, where: str, chat: Chat | None) -> str:
    """The text of a chat."""
    several = list(messages) if _is_list(messages) else []
    if not several or not all(_is_message(message) for message in several):
        raise BillhookError(
            f"{where}: `messages` must be a list like {_CHAT}; a content may be a list of {_PART}, too."
        )
    if chat is None:
        raise BillhookError(f"{where} is a chat, and the model's tokenizer has no chat template: {_TEMPLATE}.")
    try:
        return chat([_without_nulls(message) for message in several])
    except Exception as error:  # whatever the template raises
        why = first_line(error)
        raise BillhookError(f"{where}: the chat template refuses its messages ({why}): correct or remove it.") from None


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message, or a part of its content, without the nulls that a table has for the fields that only others have:
    templates ask which fields are there."""
    kept = {key: value for key, value in message.items() if value is not None}
    if _is_list(kept.get("content")):
        kept["content"] = [_without_nulls(part) for part in kept["content"]]
    return kept


def _is_message(message: Any) -> bool:
    """Whether it is an object with a role and a content, which may be null beside the calls of tools."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if _is_list(content):
        return len(content) > 0 and all(_is_text(part) for part in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _is_text(part: Any) -> bool:
    """Whether a part of a content is a text."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_list(value: Any) -> TypeGuard[Collection[Any]]:
    """Whether a value has elements, as a list has, or an array of a table."""
    return hasattr(value, "__iter__") and not isinstance(value, str | Mapping)
