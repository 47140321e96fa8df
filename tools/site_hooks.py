"""Hooks of the documentation site: links to files of the repository that are not pages become their names.

On a code host such a link leads to the file; the site does not have it.
"""

import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `[text](../path)` by the text, and the path where that says something else."""
    return _LINK.sub(
        lambda m: f"`{m[2]}`" if m[1].strip("`") in (m[2], m[2].rsplit("/", 1)[-1]) else f"{m[1]} (`{m[2]}`)", markdown
    )
