"""Fixtures for every test."""

import gc
import os
import shutil
from pathlib import Path

from paths import is_intel

gc.disable()  # until the tests are collected: nothing of what is imported for them goes

# Golden masks are compared bit for bit. Near ties are decided by the last bits of sums, so by the order in which the
# widest instructions of a processor add. The reference was made with AVX2; MKL chooses it by itself on other makes.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # also needed by bfloat16 attention on processors with AMX
if is_intel():
    os.environ.setdefault("MKL_CBWR", "AVX2")

import pytest
import torch

torch.set_num_threads(1)  # models here are tiny, and tests run in parallel
if hasattr(os, "fork"):  # a copy renews torch's threads at the first use, and fails where two threads are first at once
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported


def pytest_collection_finish() -> None:
    """Leave what is imported, some million objects, out of every later search for garbage, and search less often."""
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of trained models, texts and golden results that may lie beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder


@pytest.fixture(scope="session")
def master(tmp_path_factory) -> Path:
    """A folder with a model, a text, a table and a plan, all in order; not to be changed."""
    from command import workplace

    return workplace(tmp_path_factory.mktemp("master"))


@pytest.fixture
def place(master, tmp_path, monkeypatch) -> Path:
    """A copy of it, in which the test runs."""
    shutil.copytree(master, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"
