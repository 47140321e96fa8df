"""A run that is stopped and goes on."""

from pathlib import Path
from typing import Any

import pytest

from billhook import prune
from billhook.errors import Interrupted
from billhook.steps.prune import prepare, run
from billhook.steps.prune_job import PruneRequest


def whole_and_in_parts(source: Path, folder: Path, stop: int, **fields: Any) -> tuple[bytes, bytes]:
    """The weights of a run, and of one that was stopped after block number `stop`, counted from 1, and went on."""
    prune(source, output=folder / "whole", **fields)
    left = [stop]

    def stopping() -> bool:
        left[0] -= 1
        return left[0] == 0

    with pytest.raises(Interrupted):
        run(prepare(PruneRequest(source, output=folder / "parts", **fields)), stopping=stopping)
    prune(source, output=folder / "parts", resume=True, **fields)
    one, other = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    return one, other
