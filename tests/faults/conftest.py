"""What the trials prune, and what comes out where nothing goes wrong."""

from pathlib import Path

import pytest
import tiny
import torch
from command import contents
from trial import GBLM, MAGNITUDE, SPARSEGPT, survived

from billhook import prune


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    model = tiny.llama(num_hidden_layers=3, intermediate_size=48)
    return tiny.save(
        tmp_path_factory.mktemp("source") / "model", model, dtype=torch.bfloat16, shard="30KB", words=False
    )


@pytest.fixture(scope="session")
def expected(source, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("expected")
    runs = {"magnitude": MAGNITUDE, "sparsegpt": SPARSEGPT, "gblm": GBLM}
    return {name: contents(prune(source, output=folder / name, **fields).output) for name, fields in runs.items()}


@pytest.fixture(scope="session", autouse=True)
def count():
    """Tell how many faults were tried; a fault that was not survived has failed its test."""
    yield
    print(
        f"\nfaults tried and survived: {sum(survived.values())} "
        f"({', '.join(f'{n} {what}' for what, n in survived.items())})"
    )
