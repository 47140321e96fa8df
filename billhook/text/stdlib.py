"""The sources of the running Python's standard library as text, which every machine has.

The bundled demo model is trained, calibrated and evaluated on this text, so that examples and tests run without a
download. The modules of a fixed list, `HELD_OUT`, and their tests are never training or calibration text, and so are
held-out text for evaluation. Another Python release has slightly different sources, and so gives different numbers.
"""

from __future__ import annotations

import sysconfig
import tokenize
from pathlib import Path
from typing import Literal

from billhook.errors import BillhookError

# Top-level modules and packages that are never training text; all exist, in plain Python, from 3.11 to 3.14.
HELD_OUT: tuple[str, ...] = (
    *("argparse", "bisect", "calendar", "colorsys", "csv", "fractions", "heapq", "json", "logging", "plistlib"),
    *("sched", "shutil", "statistics", "tarfile", "textwrap", "uuid", "wsgiref", "zoneinfo"),
)

Split = Literal["train", "heldout"]

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
# generated tables of similar lines, or (pydoc_data) one giant string
_SKIPPED_NAMES = frozenset({"pydoc_data", "encodings"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# missing in a zipped, frozen or stripped standard library
_LANDMARKS = ("os.py", "argparse.py", "json/__init__.py")


def documents(split: Split, include_tests: bool = False, root: Path | None = None) -> list[tuple[str, str]]:
    """List (relative path, text) of one split, sorted by path.

    `include_tests` adds the `test` package if the interpreter has it, for training only. `root` overrides the standard
    library's folder.
    """
    if split not in ("train", "heldout"):
        raise BillhookError(f"unknown split {split!r}: use 'train' or 'heldout'")
    if include_tests and split == "heldout":
        raise BillhookError("held-out text never includes tests: leave include_tests off")
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    if not all((root / landmark).is_file() for landmark in _LANDMARKS):
        raise BillhookError(
            f"no standard library sources in {root}: this Python ships them zipped, frozen or stripped. "
            "Use a regular CPython installation, or give your own text files."
        )
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        if _split_of(parts, include_tests) == split and (text := _read(path)):
            found.append(("/".join(parts), text))
    return found


def _split_of(parts: tuple[str, ...], include_tests: bool) -> Split | None:
    """The split of the file at these path parts; None for neither."""
    top = parts[0].removesuffix(".py")
    if _SKIPPED_FOLDERS.intersection(parts) or top in _SKIPPED_NAMES or top.startswith("_sysconfigdata"):
        return None
    is_test = bool(_TEST_FOLDERS.intersection(parts[:-1]))
    if top in HELD_OUT:
        return None if is_test else "heldout"
    if not is_test:
        # a twin of a held-out module, such as `_heapq.py`, would leak its text
        return None if top.removeprefix("_") in HELD_OUT else "train"
    return "train" if include_tests and not _tests_held_out(parts) else None


def _tests_held_out(parts: tuple[str, ...]) -> bool:
    """Whether a test file is about a held-out module: `test_json/...`, `test_csv.py`, `test_uuid_extra.py`."""
    for part in parts[1:]:
        name = part.removesuffix(".py").removeprefix("test_").removeprefix("test")
        if any(name == module or name.startswith((f"{module}_", f"{module}data")) for module in HELD_OUT):
            return True
    return False


def _read(path: Path) -> str:
    """The text of a source file, by its encoding line; empty if it cannot be decoded (some are broken on purpose)."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
