"""The wheel is tagged by what it holds, and a build without a compiler says once what is missed."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from paths import ROOT

pytestmark = pytest.mark.gate


def test_without_a_compiler_the_wheel_is_for_any_platform_and_the_build_says_what_is_missed(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "billhook", tmp_path / "billhook", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    none = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel"]
    ran = subprocess.run(command, cwd=tmp_path, env=none, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
        (about,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert "Root-Is-Purelib: true" in archive.read(about).decode()
    assert ran.stderr.count("packed models will be about as fast as dense ones") == 1
