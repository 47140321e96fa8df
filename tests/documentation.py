"""The pages of the documentation, and what their marks say.

A JSON block after `<!-- format: NAME -->` is read by the tool. A table after `<!-- fields: NAME -->` lists exactly the
fields of a real NAME. A block after `<!-- run: WHAT -->` is executed.
"""

import re
from pathlib import Path
from typing import Any

from paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = ROOT / "docs" / "add_a_method.md"
FORMATS = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "formats").glob("*.md"))}


def blocks(page: Path, mark: str) -> list[str]:
    """The fenced blocks that stand behind a mark such as `run: sh`, without a common indentation."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^( *)<!-- {re.escape(mark)} -->\n+ *```\w+\n(.*?)\n *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def fields(name: str) -> dict[tuple[str, ...], bool]:
    """The documented fields of a file or output: path -> whether it is optional."""
    mark = rf"<!-- fields: {re.escape(name)}(?: = [^\n]*)? -->\n((?:\|.*\n?)+)"
    found = re.findall(mark, "\n".join(FORMATS.values()))
    assert found, f"docs/formats has no fields of {name}"
    lines = [line for text in found for line in text.splitlines()[2:]]
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines]
    return {tuple(row[0].strip("`").replace("[]", ".[]").split(".")): "optional" in row[1] for row in rows}


def check_fields(name: str, value: Any) -> None:
    """Assert that `value` has every field that is documented and not optional, and none that is not documented."""
    documented = fields(name)
    seen: set[tuple[str, ...]] = set()

    def visit(value: Any, paths: list[tuple[str, ...]], depth: int, where: str) -> None:
        if any(len(path) == depth for path in paths):
            seen.update(path for path in paths if len(path) == depth)
        elif isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else [("[]", entry) for entry in value]
            for key, entry in items:
                named = [path for path in paths if path[depth] == key] or [path for path in paths if path[depth] == "*"]
                assert named, f"{name}: {where}.{key} is not documented"
                visit(entry, named, depth + 1, f"{where}.{key}")
        else:
            assert all(documented[path] for path in paths), (
                f"{name}: {where} is {value!r}, documented are fields below it"
            )

    visit(value, list(documented), 0, "")
    # what lies below `*` is absent where there is no such key, such as options of a method that has none
    missing = [
        ".".join(path) for path, optional in documented.items() if not optional and path not in seen and path[-1] != "*"
    ]
    assert not missing, f"{name}: documented but not there: {missing}"
