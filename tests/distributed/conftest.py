"""A model of experts and a text, for runs in several processes."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.save(folder / "model", tiny.mixtral(), shard="60KB")
    tiny.text_file(folder / "text.txt", 200)
    return folder
