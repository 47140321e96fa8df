"""Compiles the kernels of `billhook.runtime` where a C++ compiler is found; without one the install succeeds and plain
torch multiplies.

They are an ordinary shared library with a C surface, loaded by ctypes: independent of the version of Python and of
torch.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("billhook", "runtime", "csrc")
# No -march: which instructions may be used is decided where the library runs. No -ffast-math: the order of sums is
# ours.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
MISSED = (
    "billhook: the kernels were not compiled. Everything works without them; packed models will be about as fast as "
    "dense ones, and quantizing takes longer. Install a C++ compiler (g++ or clang++) and Billhook again to have them."
)


class BuildKernels(build_ext):
    """Builds `_kernels.so`, with OpenMP where the compiler knows it."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file's name, without the tag of a Python version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile with OpenMP, then without it (kernels on one thread); without a compiler, say once what is missed."""
        for flags in (["-fopenmp"], []):
            ext.extra_compile_args, ext.extra_link_args = [*FLAGS, *flags], flags
            try:
                super().build_extension(ext)
            except Exception as error:
                failure = error
            else:
                PlatformWheel.holds_kernels = True
                return
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
        print(f"{MISSED} ({failure})", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3: of one platform if it holds compiled kernels, else of any."""

    holds_kernels = False

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        self.root_is_pure = not self.holds_kernels
        return "py3", "none", super().get_tag()[2] if self.holds_kernels else "any"


kernels = Extension(
    "billhook.runtime._kernels",
    sources=sorted(map(str, SOURCES.glob("*.cpp"))),
    depends=sorted(map(str, SOURCES.glob("*.h"))),
    language="c++",
    optional=True,
)
setup(
    ext_modules=[kernels] if platform.system() != "Windows" and not os.environ.get("BILLHOOK_NO_KERNELS") else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
