"""docs/cli.md: every command with its arguments, options, defaults and examples.

Options are read from the signatures of the commands and not from the printed help, whose layout changes from one
version of typer to the next.
"""

import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

from page_parts import NOTE, first_line, table
from typer.models import ArgumentInfo, OptionInfo

from billhook.cli import app


def page() -> str:
    """The text of docs/cli.md."""
    commands = app.registered_commands
    parts = [
        "# The command line",
        NOTE,
        "Exit codes: 0 success, 1 the job failed, 2 wrong usage. With `--json` one JSON object goes to stdout and "
        "everything else to stderr; its fields are listed in [JSON output](formats/json_output.md). "
        "`billhook --version` prints the version. Errors are one or two lines; the traceback of any of them is printed "
        "where the environment variable `BILLHOOK_DEBUG` is set.",
        table(
            ["command", "what it does"],
            [[f"[`billhook {c.name}`](#billhook-{c.name})", first_line(c.callback)] for c in commands],
        ),
    ]
    for command in commands:
        assert command.callback is not None
        parts += [f"## billhook {command.name}", first_line(command.callback)]
        parts += _parameters(str(command.name), command.callback)
        parts += [f"```sh\n{_examples(command.epilog or '')}\n```"]
    return "\n\n".join(parts) + "\n"


def _parameters(name: str, command: Callable[..., Any]) -> Iterator[str]:
    """The usage line, and the tables of arguments and options."""
    arguments, options = [], []
    for parameter in inspect.signature(command).parameters.values():
        kind, info = typing.get_args(parameter.annotation)
        value = info.metavar or _kind(kind)
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or parameter.name.upper()
            required = parameter.default is inspect.Parameter.empty
            arguments.append((shown if required else f"[{shown}]", str(info.help)))
        else:
            flags = _flags(parameter.name, kind, info, value)
            options.append([flags, _text(info.help, kind), _default(parameter.default)])
    yield f"`billhook {' '.join([name, *(name for name, _ in arguments)])} [OPTIONS]`"
    rows = [[f"`{name}`", meaning] for name, meaning in arguments]
    yield table(["argument", "meaning"], rows) if rows else "No arguments."
    yield table(["option", "meaning", "default"], options)


def _flags(name: str, kind: Any, info: OptionInfo, value: str) -> str:
    declared = (info.default, *(info.param_decls or ()))
    given = [flag for flag in declared if isinstance(flag, str) and flag.startswith("-")]
    plain = f"--{name.replace('_', '-')}"
    if kind is bool:
        return ", ".join(f"`{flag}`" for flag in given or (plain, f"--no-{plain[2:]}"))
    return ", ".join(f"`{flag} {value}`" for flag in given or [plain])


def _text(meaning: Any, kind: Any) -> str:
    """The help text, followed by the values to choose from."""
    inner = _without_none(kind)
    choices = typing.get_args(inner) if typing.get_origin(inner) is Literal else ()
    return str(meaning) + (f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else "")


def _kind(kind: Any) -> str:
    """The placeholder for the value of an option of this type."""
    inner = _without_none(kind)
    names = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT", bool: ""}
    return "CHOICE" if typing.get_origin(inner) is Literal else names[inner]


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not NoneType)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return "" if value is None or value is False else f"`{value}`"


def _examples(epilog: str) -> str:
    return "\n".join(line.strip() for line in epilog.splitlines() if line.strip().startswith("billhook "))
