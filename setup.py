"""Compiles the kernels of `billhook.runtime` where a C++ compiler is found; without one the install succeeds and plain
torch multiplies.

They are an ordinary shared library with a C surface, loaded by ctypes: independent of the version of Python and of
torch.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("billhook", "runtime", "csrc")
# No -march: which instructions may be used is decided where the library runs. No -ffast-math: the order of sums is
# ours.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]


class BuildKernels(build_ext):
    """Builds `_kernels.so`, with OpenMP where the compiler knows it."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file's name, without the tag of a Python version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile with OpenMP, then without it (kernels on one thread)."""
        ext.extra_compile_args, ext.extra_link_args = [*FLAGS, "-fopenmp"], ["-fopenmp"]
        try:
            super().build_extension(ext)
        except Exception:
            ext.extra_compile_args, ext.extra_link_args = [*FLAGS], []
            super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """One wheel a platform, for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        return "py3", "none", super().get_tag()[2]


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
