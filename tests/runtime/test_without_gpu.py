"""The GPU engine where there is no GPU or no Triton: one message, and kernels that still compile."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from billhook.runtime import gpu

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def test_a_missing_gpu_or_triton_is_one_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for device in ("cpu", "cuda"):
        line = gpu.missing(device)
        assert line is None or (line.endswith((".", "helps.")) and "\n" not in line)
    if not torch.cuda.is_available():
        assert "no CUDA device" in str(gpu.missing("cuda"))


@pytest.mark.nightly
def test_the_engine_imports_without_triton():
    code = WITHOUT_TRITON + "import torch; from billhook.runtime import gpu; print(gpu.missing('cpu'))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("Triton is not installed")


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from billhook.runtime import triton_kernels as kernels

TYPES = dict(mask="*u8", values="*bf16", table="*i32", scales="*fp32", bias="*bf16", x="*bf16", y="*bf16",
dense="*bf16", parts="*fp32")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def built(kernel, constants, warps, capability):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    even = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in TYPES or name in ("rows",
    "columns")}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps,
    "num_stages": 1})

for capability in (80, 90):
    for kernel, constants, warps, rows_a_thread in (
        (kernels.matvec, dict(ROWS=4, SPAN=4, GROUP=0, BIAS=True), 4, 4),
        (kernels.matmat, dict(ROWS=64, TOKENS=16, GROUP=0), 8, 8),
        (kernels.expand, dict(ROWS=4, SPAN=4, GROUP=0), 4, 4),
    ):
        binary = built(kernel, constants, warps, capability)
        text = binary.asm["ptx"]
        singles = len(re.findall(r"ld\\.global\\.b16 ", text))
        # each value by itself: nothing is known of its alignment
        assert singles == 8 * rows_a_thread, (kernel.__name__, singles)
        barriers = text.count("bar.sync")
        # for the last sum of matvec, not for tiles
        assert kernel is kernels.matmat or barriers <= 4, (kernel.__name__, barriers)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(binary.asm["cubin"])
            usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
        assert "STACK:0 " in usage.stdout + usage.stderr, (kernel.__name__, usage.stdout)  # nothing spilled
        print(kernel.__name__, capability)
"""


@pytest.mark.nightly
def test_the_kernels_compile_for_cards_without_one():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=240, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) == 12
