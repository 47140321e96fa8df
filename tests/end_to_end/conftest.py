"""Models and a text, and one pruned model."""

from pathlib import Path

import pytest
import tiny
import torch
from pruning import prune


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a sharded bfloat16 model of two blocks, one of experts, and a text."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save(folder / "model", tiny.llama(num_hidden_layers=2), dtype=torch.bfloat16, shard="20KB")
    tiny.save(folder / "experts", tiny.mixtral())
    tiny.text_file(folder / "text.txt", 60)
    return folder


@pytest.fixture(scope="module")
def pruned(place) -> Path:
    prune(place, place / "pruned", "--criterion", "sparsegpt")
    return place / "pruned"
