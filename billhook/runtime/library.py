"""Load the library of compiled kernels and select the instruction set.

`BILLHOOK_KERNELS` names an instruction set (avx512_bf16, avx512_vbmi2, avx512, avx2, neon, portable), or `torch` for
plain torch without the library; by default the best one that this processor supports is used.
"""

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from billhook.errors import BillhookError

FILE = Path(__file__).with_name("_kernels.so")
SURFACE = 5  # raised, here and in driver.cpp, when a function changes its name or arguments
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}

_forced: list[str] = []


class Matrix(ctypes.Structure):
    """A packed weight as the kernels read it, with null `starts` for a dense bfloat16 one; keep its tensors alive."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bitmask", "values", "starts", "scales")),
        *((name, ctypes.c_int64) for name in ("out", "in_", "words", "groups", "group_words")),
        ("type", ctypes.c_int32),
    )


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_OF_QUANTIZERS = ("code_sums", "search_scale", "search_range", "round_columns", "move_codes")  # take a job
_SURFACE: dict[str, tuple[list[type], type | None]] = {
    "paths": ([], _INT),
    "path_name": ([_INT], ctypes.c_char_p),
    "path_runs": ([_INT], _INT),
    "multiply": ([_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT, _INT, _INT], _INT),
    "gemm": ([_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT], None),
    "gemm_bytes": ([_POINTER, _LONG, _INT, _INT, _INT], _LONG),
    "expand": ([_POINTER, _LONG, _LONG, _POINTER, _INT, _INT, _INT], None),
    "row_starts": ([_POINTER, _LONG, _LONG, _POINTER], _LONG),
    "bitmask": ([_POINTER, _INT, _LONG, _LONG, _POINTER, _INT], None),
    "closest": ([_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT, _INT], None),
    **dict.fromkeys(_OF_QUANTIZERS, ([_POINTER, _INT, _INT], None)),
    "read": ([_POINTER, _LONG, _INT], ctypes.c_uint64),
    "gather": ([_POINTER, _INT, _POINTER, _POINTER, _INT], None),
}


@functools.cache
def _load() -> ctypes.CDLL | None:
    """The library, or None where it was not built, with one message on stderr."""
    try:
        library = ctypes.CDLL(str(FILE))  # torch, imported above, has loaded the OpenMP runtime that both share
        if not hasattr(library, "billhook_surface") or library.billhook_surface() != SURFACE:
            raise OSError("they were compiled from the sources of another version; install Billhook again")
    except OSError as error:
        why = str(error) if FILE.exists() else "they were not compiled; install a C++ compiler and Billhook again"
        text = f"packed layers and quantizers do without their compiled loops, which are several times as fast: {why}."
        print(f"billhook: {text}", file=sys.stderr)
        return None
    for name, (arguments, result) in _SURFACE.items():
        function = getattr(library, f"billhook_{name}")
        function.argtypes, function.restype = arguments, result
    return library


@functools.cache
def _paths() -> dict[str, int]:
    """The instruction sets that this processor supports, best first, and their numbers."""
    library = _load()
    if library is None:
        return {}
    supported = filter(library.billhook_path_runs, range(library.billhook_paths()))
    return {library.billhook_path_name(path).decode(): path for path in supported}


def paths() -> list[str]:
    """The instruction sets that can be used on this machine, best first; `torch` is always the last."""
    return [*_paths(), "torch"]


def path() -> str:
    """The instruction set in use. Raises BillhookError when the requested one does not run here."""
    name = _forced[-1] if _forced else os.environ.get("BILLHOOK_KERNELS") or paths()[0]
    if name not in paths():
        raise BillhookError(f"The kernels {name!r} do not run on this machine. Available: {', '.join(paths())}.")
    return name


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use one instruction set, or `torch`, inside the `with`; raises BillhookError when it does not run here."""
    _forced.append(name)
    try:
        path()
        active.cache_clear()
        yield
    finally:
        _forced.pop()
        active.cache_clear()


@functools.cache
def active() -> tuple[ctypes.CDLL, int] | None:
    """The library and the number of the instruction set in use; None for plain torch."""
    name = path()
    library = None if name == "torch" else _load()
    return None if library is None else (library, _paths()[name])


def path_number() -> int:
    """The number of the instruction set in use, -1 for plain torch."""
    found = active()
    return -1 if found is None else found[1]


def cpu() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    keys = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    model = " ".join(known[key] for key in keys if key in known)
    return model or platform.processor() or platform.machine()


def about() -> dict[str, object]:
    """The `path` (instruction set) in use, all `paths` (best first), the `cpu` and the number of `threads`."""
    return {"path": path(), "paths": paths(), "cpu": cpu(), "threads": torch.get_num_threads()}
