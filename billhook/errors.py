"""The errors that a user can see: a mistake to correct, and a job that failed; and the test for out of memory.

Every message says what is wrong, where, and what to do. The command line prints it and exits with `exit_code`. Messages
name options as on the command line; where Python called, they are shown as its keywords (`in_python`).
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_ON_COMMAND_LINE = [False]
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # in names from foreign files, such as a line break
_FLAGS = ("resume", "overwrite", "published", "pack", "grid", "trust-remote-code", "random")
_OPTION = re.compile(
    r"(?:billhook [a-z]+|llama-[\w-]+) .*?(?=[.;:)](?:\s|$)|$)"  # a command for a shell, which stays one
    r"|--set (?P<setting>\w+(?:=[\w.]+\b)?)"
    r"|--(?P<method>criterion|allocator|recipe|quantizer) (?P<its_name>[a-z]\w*)"
    r"|--(?P<name>[a-z][a-z-]*)(?: (?P<value>\d[\w.]*\b|[a-z]\w*:[\w.]*|[a-z]+\d+\b|\w+(?:\.\w+)+|[A-Z]{2,}|'[^']+'))?"
)


@contextmanager
def on_command_line() -> Iterator[None]:
    """Show options as they are written on the command line."""
    before, _ON_COMMAND_LINE[0] = _ON_COMMAND_LINE[0], True
    try:
        yield
    finally:
        _ON_COMMAND_LINE[0] = before


def called_from_python() -> bool:
    """Whether options are Python's keywords."""
    return not _ON_COMMAND_LINE[0]


def in_python(message: str) -> str:
    """The message with options as Python's keywords: `--dtype float32` is `dtype="float32"`, `--resume` is
    `resume=True`; commands for a shell stay."""

    def keyword(found: re.Match[str]) -> str:
        if found["setting"]:
            return found["setting"]
        name, value = found["name"] or found["method"], found["value"] or found["its_name"]
        if name is None:
            return found[0]
        word = str(name).replace("-", "_")
        if value is None:
            return f"{word}=True" if name in _FLAGS else word
        if value.startswith("'"):
            return f"{word}=r{value}"
        literal = value.replace(".", "").isdigit() or value.isupper()
        return f"{word}={value}" if literal else f'{word}="{value}"'

    return _OPTION.sub(keyword, message)


def ignoring(names: Sequence[str]) -> str:
    """The options that leave out the layers of these names; of many, also those that differ from them in numbers."""
    wanted = list(names)
    if len(names) > 3:
        kinds = dict.fromkeys(re.sub(r"(?<=\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name)) for name in names)
        wanted = [f"re:{kind}$" for kind in kinds]
    if called_from_python():
        return f"ignore={wanted}"
    return " ".join(f"--ignore {shlex.quote(pattern)}" for pattern in wanted)


class BillhookError(ValueError):
    """A request that cannot be carried out (exit code 2)."""

    exit_code = 2

    def __str__(self) -> str:
        message = _CONTROL.sub(lambda found: repr(found[0])[1:-1], super().__str__())
        return message if _ON_COMMAND_LINE[0] else in_python(message)


class JobError(BillhookError):
    """A job that failed while it ran: full disk, damaged output, numerical trouble (exit code 1)."""

    exit_code = 1


class DiskFull(JobError):
    """A disk without room for what is to be written (exit code 1)."""


class Interrupted(JobError):
    """A run that was interrupted and can be resumed (exit code 1).

    `stopped`: by Ctrl-C or SIGTERM, not by a fault; `advised`: the message says with what command it goes on.
    """

    def __init__(self, message: str, *, stopped: bool = False, advised: bool = False) -> None:
        super().__init__(message)
        self.stopped, self.advised = stopped, advised


def first_line(error: BaseException, longest: int = 200) -> str:
    """At most `longest` characters of the first line of an error's message; the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:longest]


# torch has its own class for a GPU only; these are the messages of its allocator and libraries
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    "cannot allocate memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine or a GPU is out of memory."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
