"""Write the generated pages: docs/cli.md from the declarations that --help prints, docs/methods_table.md from the
registries.

    python tools/make_docs.py            write both
    python tools/make_docs.py --check    write nothing; exit 1 and name the pages that are not up to date

Options are read off the commands' signatures and not off the printed help, whose layout changes from one version of
typer to the next.
"""

import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

from typer.models import ArgumentInfo, OptionInfo

from billhook.architectures.layers import FAMILIES
from billhook.cli import app
from billhook.measurement import METRICS
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.metrics import CURVES, FACTS
from billhook.registry import Registry

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTE = "<!-- Made by tools/make_docs.py (`make docs`). Do not edit by hand. -->"


def main(arguments: Sequence[str], docs: Path = DOCS) -> int:
    """Write or check every page below `docs`; returns the exit code."""
    check = list(arguments) == ["--check"]
    if arguments and not check:
        print(__doc__, file=sys.stderr)
        return 2
    stale = {name: text for name, text in pages().items() if not _is(docs / name, text)}
    for name, text in stale.items():
        if check:
            print(f"{docs / name} is not up to date: run make docs", file=sys.stderr)
        else:
            (docs / name).write_text(text, encoding="utf-8")
            print(f"wrote {docs / name} ({len(text.splitlines())} lines)")
    return 1 if check and stale else 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def pages() -> dict[str, str]:
    """File name -> content of each generated page."""
    return {"cli.md": command_line(), "methods_table.md": methods()}


def command_line() -> str:
    """The page of all commands with their arguments, options, defaults and examples."""
    commands = app.registered_commands
    parts = [
        "# The command line",
        NOTE,
        "Exit codes: 0 done, 1 the job failed, 2 wrong usage. With `--json` one JSON object goes to stdout and "
        "everything else to stderr; "
        "its fields are in [formats.md](formats.md). `billhook --version` prints the version.",
        table(
            ["command", "what it does"],
            [[f"[`billhook {c.name}`](#billhook-{c.name})", _doc(c.callback)] for c in commands],
        ),
    ]
    for command in commands:
        assert command.callback is not None
        parts += [
            f"## billhook {command.name}",
            _doc(command.callback),
            *_parameters(str(command.name), command.callback),
        ]
        parts += [f"```sh\n{_examples(command.epilog or '')}\n```"]
    return "\n\n".join(parts) + "\n"


def _parameters(name: str, command: Callable[..., Any]) -> Iterator[str]:
    """The usage line, and the tables of arguments and options."""
    arguments, options = [], []
    for parameter in inspect.signature(command).parameters.values():
        kind, info = typing.get_args(parameter.annotation)
        value = info.metavar or _kind(kind)
        if isinstance(info, ArgumentInfo):
            arguments.append((info.metavar or parameter.name.upper(), str(info.help)))
        else:
            options.append(
                [_flags(parameter.name, kind, info, value), _text(info.help, kind), _default(parameter.default)]
            )
    yield f"`billhook {' '.join([name, *(name for name, _ in arguments)])} [OPTIONS]`"
    yield (
        table(["argument", "meaning"], [[f"`{name}`", meaning] for name, meaning in arguments])
        if arguments
        else "No arguments."
    )
    yield table(["option", "meaning", "default"], options)


def _flags(name: str, kind: Any, info: OptionInfo, value: str) -> str:
    given = [
        flag for flag in (info.default, *(info.param_decls or ())) if isinstance(flag, str) and flag.startswith("-")
    ]
    plain = f"--{name.replace('_', '-')}"
    if kind is bool:
        return ", ".join(f"`{flag}`" for flag in given or (plain, f"--no-{plain[2:]}"))
    return ", ".join(f"`{flag} {value}`" for flag in given or [plain])


def _text(meaning: Any, kind: Any) -> str:
    """The help text; the values to choose from follow it."""
    inner = _without_none(kind)
    chosen = (
        ", ".join(f"`{choice}`" for choice in typing.get_args(inner)) if typing.get_origin(inner) is Literal else ""
    )
    return str(meaning) + (f" One of {chosen}." if chosen else "")


def _kind(kind: Any) -> str:
    """What to write for the value of an option of this type."""
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


def methods() -> str:
    """The page of all allocators, criteria, metrics and families."""
    signs = {1: "larger", -1: "smaller"}
    sources = {
        "spectrum": "weights",
        "weight": "weights",
        "activations": "activations",
        "loss": "loss on text",
        "trial": "a trial on text",
    }
    metrics = [[f"`{m.name}`", m.summary, signs[m.sign], sources[m.reads], m.paper] for m in FACTS.values()]
    curves = [[f"`{m.name}`", m.summary, sources[m.reads], m.paper] for m in CURVES.values()]
    parts = [
        "# All methods",
        NOTE,
        "Formulas in full, sources and deviations: [METHODS.md](METHODS.md).",
        "## Allocators: how much each layer loses",
        _registry(ALLOCATORS),
        "## Criteria: which weights of a layer go",
        _registry(CRITERIA),
        "## Metrics: columns of the table that allocators read",
        f"A parameter may follow the name after a colon: {_with_parameter()}.",
        table(["metric", "what it is", "more sparsity where it is", "computed from", "source"], metrics),
        "## Curves: quantiles of each layer's scores, measured by name like metrics",
        table(["curve", "what it is", "computed from", "source"], curves),
        "## Families: `model_type` in config.json, tested in every release",
        ", ".join(f"`{family}`" for family in FAMILIES) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _registry(registry: Registry) -> str:
    rows = []
    for name in registry.names():
        options = registry.options(name)
        listed = (
            ", ".join(f"`{o.name}={'none' if o.default is None else o.default}`" for o in options.values()) or "none"
        )
        needs = (
            ", ".join(f"`{n}`" for n in registry.needs(name, {o.name: o.default for o in options.values()}))
            or "nothing"
        )
        compares = [registry.group(name)] if registry is CRITERIA else []
        rows.append([f"`{name}`", _doc(registry.get(name)), listed, needs, *compares, registry.paper(name)])
    header = [
        "name",
        "what it does",
        "options and defaults",
        "reads",
        *(["compares within a"] if registry is CRITERIA else []),
        "source",
    ]
    return table(header, rows)


def _with_parameter() -> str:
    found = []
    for name in FACTS:
        for option in METRICS.options(name).values():
            choices = typing.get_args(option.annotation) or (option.name.upper(),)
            found += [f"{name}:{choice}" for choice in choices if choice != option.default]
    return ", ".join(f"`{name}`" for name in found)


def _doc(function: Callable[..., Any] | None) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars inside a cell are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
