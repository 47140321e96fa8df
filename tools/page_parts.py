"""Pieces of Markdown that several generated pages use."""

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

NOTE = "<!-- Made by tools/make_docs.py (`make docs`). Do not edit by hand. -->"
_LABEL = re.compile(r"^(Differences from [^:\n]+|Measured(?: agreement)?[^:\n]*|Limits|Cost):", re.MULTILINE)
_ARXIV = re.compile(r"\barXiv:(\d{4}\.\d{5})")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars inside a cell are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def first_line(function: Callable[..., Any] | None) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def title_and_text(module: ModuleType) -> tuple[str, str]:
    """What stands before and after the first colon of a module's docstring."""
    title, _, text = (ast.get_docstring(ast.parse(inspect.getsource(module))) or "").partition(": ")
    return title, text[:1].upper() + text[1:]


def summary(module: ModuleType) -> str:
    """The first paragraph of a module's docstring, without its title."""
    return title_and_text(module)[1].partition("\n\n")[0].replace("\n", " ")


def prose(text: str, links: dict[str, str] | None = None) -> str:
    """A docstring as Markdown: labels in bold, arXiv numbers and the names in `links` (name -> target) as links."""
    text = _LABEL.sub(r"**\1:**", text)
    text = _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    for name, target in (links or {}).items():
        text = re.sub(rf"(?<!\[)`{re.escape(name)}`", f"[`{name}`]({target})", text)
    return text
