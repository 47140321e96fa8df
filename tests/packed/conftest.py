"""A dense model and the same model packed."""

from pathlib import Path

import pytest
import tiny
import torch
from sparse_models import prune_at_random

from billhook import pack


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with tied embeddings: `dense`, and `packed`."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder / "dense", prune_at_random(tiny.llama()), dtype=torch.bfloat16)
    pack(folder / "dense", folder / "packed")
    return folder
