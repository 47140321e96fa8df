"""Chats as text, by the chat template of a tokenizer."""

from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.text.rows import Chat
from billhook.text.sampling import habit


def chat_of(tokenizer: Tokenizer | None) -> Chat | None:
    """What writes the messages of a chat as text; None without a chat template.

    The special tokens that the tokenizer puts before a text by itself are left out of what the template writes, as they
    would be there twice.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return None
    begun = "".join(tokenizer.convert_ids_to_tokens(list(habit(tokenizer))))

    def write(messages: list[dict[str, Any]]) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(text, str)
        return text.removeprefix(begun)

    return write
