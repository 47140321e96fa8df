"""Text that every machine has: the sources of the running Python's standard library.

The bundled demo model is trained, calibrated and evaluated on this text, so that every example and test of this project
runs without a download. A fixed list of modules, `HELD_OUT`, is kept apart by name: neither their sources nor their
tests are ever training or calibration text, which makes them honest evaluation text.

The text belongs to the interpreter that reads it: another Python release gives slightly different sources, hence
slightly different numbers. Compare numbers only within one release. This module imports the standard library alone.
"""

from __future__ import annotations

import sysconfig
import tokenize
from pathlib import Path
from typing import Literal

from billhook.errors import BillhookError

HELD_OUT: tuple[str, ...] = (
    "argparse",
    "bisect",
    "calendar",
    "colorsys",
    "csv",
    "fractions",
    "heapq",
    "json",
    "logging",
    "plistlib",
    "sched",
    "shutil",
    "statistics",
    "tarfile",
    "textwrap",
    "uuid",
    "wsgiref",
    "zoneinfo",
)
"""Top-level modules and packages that are never training text; all exist, in plain Python, from 3.11 to 3.14."""

Split = Literal["train", "heldout"]

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
# Generated tables: machine-written, one line after another alike, and some of them (pydoc_data) one giant string.
_SKIPPED_NAMES = frozenset({"pydoc_data", "encodings"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# A folder without these is a zipped, frozen or stripped standard library.
_LANDMARKS = ("os.py", "argparse.py", "json/__init__.py")


def documents(split: Split, include_tests: bool = False, root: Path | None = None) -> list[tuple[str, str]]:
    """List `(relative path, text)` of one split, sorted by path.

    `include_tests` adds the `test` package where the interpreter has it (training only: it is absent on many machines,
    so calibration and evaluation never use it). `root` overrides the standard library's folder.
    """
    if split not in ("train", "heldout"):
        raise BillhookError(f"unknown split {split!r}: use 'train' or 'heldout'")
    if include_tests and split == "heldout":
        raise BillhookError("held-out text never includes tests: leave include_tests off")
    root = _source_root() if root is None else root
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


def _source_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _split_of(parts: tuple[str, ...], include_tests: bool) -> Split | None:
    """Say which split the file at these path parts belongs to; None for neither."""
    top = parts[0].removesuffix(".py")
    if _SKIPPED_FOLDERS.intersection(parts) or top in _SKIPPED_NAMES or top.startswith("_sysconfigdata"):
        return None
    is_test = bool(_TEST_FOLDERS.intersection(parts[:-1]))
    if top in HELD_OUT:
        return None if is_test else "heldout"
    if not is_test:
        # `_pydecimal`-style twins of a held-out module (`_heapq.py`, say) would leak its text.
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
    """Read a source file as its own encoding line says; empty if it cannot be decoded (some are broken on purpose)."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
