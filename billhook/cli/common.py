"""What the commands share: options, progress, output and the way errors end a command."""

import functools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Literal

import typer

from billhook.distributed.torchrun import processes, rank, started
from billhook.errors import BillhookError, out_of_memory

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="Only these layers: a class name, an exact name, or re:REGEX. Repeatable.", metavar="PATTERN"),
]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Leave these layers alone; same patterns. Repeatable.", metavar="PATTERN")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text the model looks at: FILE.txt, FILE.jsonl (field text), TOKENS.safetensors, "
        "hub:NAME[:config][:split], stdlib:train.",
        metavar="SOURCE",
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration windows.", min=1)]
Length = Annotated[
    int | None,
    typer.Option(help="Tokens in a window; by default 2048 or the model's context if that is shorter.", min=2),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="Draw windows, count zeros and accumulate gradients as the released code of the papers does.",
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Windows a forward pass; by default chosen by size.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Type to compute in; auto is the checkpoint's."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the method, such as epsilon=0.3. Repeatable.", metavar="KEY=VALUE"),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Allocator, options and sparsity as published: see billhook ls presets.", metavar="NAME"),
]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the model. Read that code first.")]

EVERY = 60.0  # seconds between lines of progress
SPREAD = 1.25  # a range is told where its ends are further apart


class Failure(Exception):
    """Ends a command whose error was already shown."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def say(text: str) -> None:
    """Tell a person something (stderr); of several processes, the first one does."""
    if rank():
        return
    print(text, file=sys.stderr, flush=True)


def emit(value: dict[str, Any]) -> None:
    """Print the one JSON object of --json; of several processes, the first one does."""
    if rank():
        return
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def print_error(message: str, code: int, as_json: bool) -> None:
    """Show an error to a person (stderr) and, with --json, to a machine (stdout)."""
    who = f"billhook, process {rank()} of {processes()}" if started() else "billhook"
    print(f"{who}: {message}", file=sys.stderr, flush=True)
    if as_json:
        with suppress(OSError):  # a stdout that cannot be written may be the error itself
            emit({"error": message, "exit_code": code})


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into a message and an exit code; with --json the message is also the JSON object."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            return
        except BillhookError as error:
            message, code = str(error), error.exit_code
        except KeyboardInterrupt:
            message, code = "Stopped. Nothing was written.", 1
        except OSError as error:
            where = "standard output" if error.filename is None else str(error.filename)[:200]
            message, code = f"Cannot read or write {where}: {error.strerror or error}.", 1
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            message, code = "Out of memory. Use fewer --samples, a shorter --length or a smaller --batch-size.", 1
        print_error(message, code, bool(kwargs.get("as_json")))
        raise Failure(code)

    return run


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of stopping: yields what tells whether there was one. The second stops at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("Stopping when this block is finished. Ctrl-C again stops at once; what is finished is kept either way.")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def parse_settings(pairs: list[str] | None) -> dict[str, str]:
    """Split KEY=VALUE arguments; raises BillhookError for one without '=' or given twice."""
    settings: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise BillhookError(f"--set {pair}: write KEY=VALUE, for example --set epsilon=0.3.")
        if key in settings:
            raise BillhookError(f"--set {key} is given twice.")
        settings[key] = value
    return settings


def announce(cost: Mapping[str, float]) -> None:
    """Tell what a job will cost, before it starts, and where less is free than it takes."""
    from billhook.costs.estimate import too_little

    say(f"About {_times(cost)}, {cost['memory_gib']:.2f} GiB of memory, {cost['disk_gib']:.2f} GiB of disk.")
    if lacking := too_little(cost):
        say(f"note: {lacking}")


@contextmanager
def estimated() -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yields what to call with the estimate when work begins; at the end, tell what it did cost."""
    from billhook.costs.estimate import peak_gib

    begun: list[tuple[Mapping[str, float], float]] = []

    def begin(cost: Mapping[str, float]) -> None:
        announce(cost)
        begun.append((cost, time.perf_counter()))

    yield begin
    for cost, start in begun:
        took = time.perf_counter() - start
        say(
            f"It took {took:.1f} s (estimated {_times(cost)}) and {peak_gib():.2f} GiB (estimated "
            f"{cost['memory_gib']:.2f})."
        )


def _times(cost: Mapping[str, float]) -> str:
    """The estimated time: a range where part of the work may end early; minutes or hours where it is long."""
    least, most = cost["seconds_least"], cost["seconds"]
    unit, length = next(((name, size) for name, size in (("h", 3600.0), ("min", 60.0)) if most >= 3 * size), ("s", 1.0))
    shown = [f"{value / length:.{1 if value < 10 * length else 0}f}" for value in (least, most)]
    return f"{shown[0]} to {shown[1]} {unit}" if most > SPREAD * least else f"{shown[1]} {unit}"


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show a bar with time left on a terminal, a line a minute elsewhere; yields a function to call with the name of
    each finished unit.

    Elsewhere is a file, a pipe, a terminal that cannot move its cursor, and a notebook, where a bar would need widgets.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal or console.is_jupyter or console.is_dumb_terminal or rank():
        yield _lines(what, total)
        return
    counts = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*counts, TextColumn("{task.fields[item]}"), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, item="")

        def advance(item: str) -> None:
            bar.update(task, advance=1, item=item)

        yield advance


def _lines(what: str, total: int | None) -> Callable[[str], None]:
    """The progress of long jobs in plain lines."""
    start = last = time.monotonic()
    done = 0

    def advance(item: str) -> None:
        nonlocal done, last
        done, now = done + 1, time.monotonic()
        if now - last >= EVERY:
            last = now
            left = (
                "" if total is None else f" of {total}, about {(now - start) / done * (total - done) / 60:.0f} min left"
            )
            say(f"{what}: {done}{left}, {item}")

    return advance


def table(title: str, header: list[str], rows: list[list[str]], numeric_from: int = 1) -> None:
    """Print a table on stdout; columns from `numeric_from` on are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for position, name in enumerate(header):
        grid.add_column(name, justify="right" if position >= numeric_from else "left", no_wrap=position == 0)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
