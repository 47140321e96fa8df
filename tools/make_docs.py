"""Write the generated pages of docs/: cli.md from the commands, methods/ from the registries, tables in formats/.

python tools/make_docs.py            write them
python tools/make_docs.py --check    write nothing; exit 1 and name the pages that are not up to date
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import command_page
import field_tables
import method_pages

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(arguments: Sequence[str], docs: Path = DOCS) -> int:
    """Write or check every generated page below `docs`; returns the exit code."""
    check = list(arguments) == ["--check"]
    if arguments and not check:
        print(__doc__, file=sys.stderr)
        return 2
    wanted = pages()
    stale = [docs / name for name, text in wanted.items() if not _holds(docs / name, text)]
    stale += [path for path in sorted((docs / "methods").glob("*.md")) if f"methods/{path.name}" not in wanted]
    for path in stale:
        text = wanted.get(path.relative_to(docs).as_posix())
        if check:
            print(f"{path} is not up to date: run make docs", file=sys.stderr)
        elif text is None:
            path.unlink()
            print(f"removed {path}")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path} ({len(text.splitlines())} lines)")
    return 1 if check and stale else 0


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def pages() -> dict[str, str]:
    """File name below docs/ -> content of each generated page."""
    found = {"cli.md": command_page.page()}
    found |= {f"methods/{name}": text for name, text in method_pages.pages().items()}
    return found | {f"formats/{name}": text for name, text in field_tables.pages(DOCS / "formats").items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
