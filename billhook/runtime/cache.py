"""Measurements of this machine, cached as JSON files in the user's cache folder.

`BILLHOOK_CACHE` names another folder, or `0` for none. A file that cannot be read is ignored with a message on stderr;
a failure to write one is ignored silently.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

import billhook
from billhook.errors import BillhookError
from billhook.runtime import library
from billhook.store.files import cache_folder, read_json, write_json

KERNELS = 5  # raised when a kernel is added, renamed or made faster, so that older measurements are not used


def cache_file(name: str) -> Path | None:
    """The file of the measurements `name` for this processor, instruction set, versions and number of threads."""
    root = cache_folder()
    if root is None:
        return None
    versions = [billhook.__version__, torch.__version__, KERNELS]
    machine = [library.cpu(), library.path(), *versions, torch.get_num_threads(), os.cpu_count()]
    return root / f"{name}-{hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]}.json"


def load(name: str) -> dict[str, str]:
    """The stored measurements, empty where there are none."""
    path = cache_file(name)
    if path is None or not path.exists():
        return {}
    try:
        stored = read_json(path, "cache of measurements")
        choices = stored.get("choices") if stored.get("version") == 1 else None
        if not isinstance(choices, dict) or not all(isinstance(value, str) for value in choices.values()):
            raise BillhookError(f"{path} is not a cache of measurements.")
    except BillhookError as error:
        print(f"billhook: {error} It is ignored; delete it to stop this message.", file=sys.stderr)
        return {}
    return choices


def store(name: str, choices: dict[str, str]) -> None:
    """Add measurements to the stored ones."""
    path = cache_file(name)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": 1, "choices": load(name) | choices})
    except (BillhookError, OSError):
        return  # the next load measures again, in about a second
