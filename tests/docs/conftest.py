"""What tests of the documentation start from."""

from pathlib import Path

import pytest
from paths import DEMO


@pytest.fixture
def playground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "billhook").mkdir()
    (tmp_path / "billhook" / "demo_model").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    return tmp_path
