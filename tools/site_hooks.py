"""Hooks of the documentation site.

The generated pages of docs/methods join the navigation, and links to files of the repository that are not pages become
their names: on a code host such a link leads to the file, but the site does not have it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)]+)\)")


def on_config(config: Any) -> Any:
    """Add every page of docs/methods to the section of the navigation that holds its index."""
    pages = sorted(path.name for path in Path(config["docs_dir"], "methods").glob("*.md") if path.name != "index.md")
    for section in config["nav"]:
        for entries in section.values():
            if isinstance(entries, list) and {"Methods": ["methods/index.md"]} in entries:
                entries[entries.index({"Methods": ["methods/index.md"]})]["Methods"] += [f"methods/{p}" for p in pages]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that leave docs/ by their text, and by the path where the text says something else."""
    return without_outer_links(markdown, posixpath.dirname(page.file.src_uri))


def without_outer_links(markdown: str, folder: str) -> str:
    """`markdown` of a page in `folder` (below docs/, "" for docs/ itself) with links to pages of the site only."""

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return link[0]
        return f"`{path}`" if text.strip("`") in (path, posixpath.basename(path)) else f"{text} (`{path}`)"

    return _LINK.sub(replaced, markdown)
