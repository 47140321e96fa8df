"""The compiled library: one OpenMP runtime with torch, and what happens where the library is missing or another one."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from billhook.errors import BillhookError
from billhook.runtime import autotune, library

pytestmark = pytest.mark.gate


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BILLHOOK_CACHE", "0")
    autotune.clear_choices()
    yield
    autotune.clear_choices()


_RUNTIMES = """
import torch
from billhook.runtime.linear import SparseLinear
layer = SparseLinear.from_dense(torch.eye(600, 2048).bfloat16(), None)
layer(torch.randn(1, 2048).bfloat16())
for line in open("/proc/self/maps"):
    print(line.split()[-1])
"""


@pytest.mark.nightly
def test_torch_and_the_kernels_share_one_openmp_runtime():
    if library.active() is None or not Path("/proc/self/maps").exists():
        pytest.skip("needs compiled kernels and /proc")
    run = subprocess.run([sys.executable, "-c", _RUNTIMES], capture_output=True, text=True, check=True)
    runtimes = {
        line for line in run.stdout.splitlines() if any(name in line for name in ("libgomp", "libomp", "libiomp"))
    }
    assert len(runtimes) == 1, runtimes


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BillhookError, match="sse9"), library.forced("sse9"):
        pass
    monkeypatch.setenv("BILLHOOK_KERNELS", "mmx")
    with pytest.raises(BillhookError, match="mmx"):
        library.path()


def test_a_library_of_another_version_is_not_used():
    if library.active() is None:
        pytest.skip("needs compiled kernels")
    code = "from billhook.runtime import library\nlibrary.SURFACE += 1\nassert library.paths() == ['torch']\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert "another version" in ran.stderr


@pytest.mark.nightly
def test_a_missing_library_is_one_message(tmp_path: Path):
    code = (
        "import sys, pathlib, torch\n"
        "from billhook.runtime import library\n"
        f"library.FILE = pathlib.Path({str(tmp_path / '_kernels.so')!r})\n"
        "from billhook.runtime.linear import SparseLinear\n"
        "W = torch.eye(70).bfloat16()\n"
        "layer = SparseLinear.from_dense(W)\n"
        "x = torch.randn(3, 70).bfloat16()\n"
        "assert torch.equal(layer(x), x) and torch.equal(layer.dense(), W)\n"
        "assert library.paths() == ['torch'] and library.about()['path'] == 'torch'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert "compiler" in ran.stderr
