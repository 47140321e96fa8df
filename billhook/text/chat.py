"""Chats as text, by the chat template of a tokenizer.

A content is a text or a list of parts {"type": "text", "text": "..."}, and a template may be written for one of these
alone: of the other it writes the Python or JSON form of the list, or nothing. Such contents are given to it in the form
that it writes.
"""

import json
from collections.abc import Iterator
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.text.rows import Chat
from billhook.text.sampling import habit

Messages = list[dict[str, Any]]


def chat_of(tokenizer: Tokenizer | None) -> Chat | None:
    """What writes the messages of a chat as text; None without a chat template.

    The special tokens that the tokenizer puts before a text by itself are left out of what the template writes, as they
    would be there twice. What is returned raises whatever the template raises, and ValueError where the contents are
    not in what it writes.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return None
    begun = "".join(tokenizer.convert_ids_to_tokens(list(habit(tokenizer))))

    def write(messages: Messages) -> str:
        refusal: Exception = ValueError("it does not write their contents")
        for number, form in enumerate(_forms(messages)):
            try:
                text = tokenizer.apply_chat_template(form, tokenize=False)
            except Exception as error:  # whatever the template raises
                refusal = error if number == 0 else refusal
                continue
            assert isinstance(text, str)
            if _is_written(form, text):
                return text.removeprefix(begun)
        raise refusal

    return write


def _forms(messages: Messages) -> Iterator[Messages]:
    """The messages as they are, with every content as a text, and with every content as a list of parts."""
    yield messages
    contents = [message.get("content") for message in messages]
    if any(isinstance(content, list) for content in contents):
        yield [{**m, "content": "\n".join(_texts(m))} if m.get("content") else m for m in messages]
    if any(isinstance(content, str) for content in contents):
        parts = [[{"type": "text", "text": text} for text in _texts(m)] for m in messages]
        yield [{**m, "content": own} if m.get("content") else m for m, own in zip(messages, parts, strict=True)]


def _texts(message: dict[str, Any]) -> list[str]:
    """The texts of a message's content."""
    content = message.get("content")
    return [content] if isinstance(content, str) else [part["text"] for part in content or ()]


def _is_written(messages: Messages, text: str) -> bool:
    """Whether a template wrote the last texts of the user, and no list in the form that it has in Python or JSON.

    Templates leave out other parts, such as what an assistant thought before earlier answers.
    """
    lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    if any(str(parts) in text or json.dumps(parts, ensure_ascii=False) in text for parts in lists if parts):
        return False
    asked = [[part.strip() for part in _texts(message)] for message in messages if message["role"] == "user"]
    return all(part in text for part in next((parts for parts in reversed(asked) if any(parts)), []))
