"""Rows of a source of text: what a document may be."""

import logging
from typing import Any

from billhook.errors import BillhookError


def checked(text: Any, where: str) -> str:
    """A document, which must be a string; raises BillhookError naming `where` it was found."""
    if not isinstance(text, str):
        raise BillhookError(f"{where}: the text is of type {type(text).__name__}, not a string.")
    return text


def warn_of_nulls(count: int, source: str) -> None:
    """Log how many rows of a source were skipped because their text is null."""
    if count:
        logging.getLogger(__name__).warning(
            "note: rows of %s that were skipped because their text is null: %d.", source, count
        )
