"""The kernels under AddressSanitizer and UBSan, and those for other processors under emulation.

Both run `native/check_kernels.cpp`: random packed matrices through every kernel, buffers no larger than promised,
against plain sums.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import billhook

SOURCES = Path(billhook.__file__).parent / "runtime" / "csrc"
CHECK = Path(__file__).parent / "native" / "check_kernels.cpp"
CASES = 60

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


def built(compiler: str, tmp_path: Path, *flags: str) -> Path:
    """The check, compiled with the kernels into one program."""
    program = tmp_path / "check"
    command = [
        compiler,
        "-O1",
        "-g",
        "-std=c++17",
        "-w",
        *flags,
        f"-I{SOURCES}",
        str(CHECK),
        *map(str, sorted(SOURCES.glob("*.cpp"))),
    ]
    ran = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if (
        ran.returncode
        and "-fsanitize" in " ".join(flags)
        and ("cannot find" in ran.stderr or "unrecognized" in ran.stderr)
    ):
        pytest.skip("the compiler has no sanitizers")
    assert ran.returncode == 0, ran.stderr
    return program


def test_kernels_pass_the_sanitizers(tmp_path: Path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = built(compiler, tmp_path, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    ran = subprocess.run([program, str(CASES), "1"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "portable" in ran.stdout
    assert "agree" in ran.stdout


def test_neon_kernels_agree_under_emulation(tmp_path: Path):
    if platform.machine() == "aarch64":
        pytest.skip("the other tests run NEON itself here")
    compiler, emulator = (
        shutil.which("aarch64-linux-gnu-g++"),
        shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static"),
    )
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    program = built(compiler, tmp_path, "-static")
    ran = subprocess.run([emulator, program, str(CASES), "2"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("neon portable agree")
