"""What the commands share: options, output, progress with the time left, and error handling."""

import functools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from billhook.distributed.torchrun import processes, rank, started
from billhook.errors import BillhookError, out_of_memory

if TYPE_CHECKING:
    from billhook.architectures.layers import Layer
    from billhook.steps.estimate import Estimate

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
Sampling = Annotated[
    Literal["packed", "papers"],
    typer.Option(
        help="How windows are drawn: packed (documents joined) or papers (one long document each, random start)."
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
Advance = Callable[[str], None]  # called with the name of each finished item


class Failure(Exception):
    """Ends a command whose error has been printed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def say(text: str) -> None:
    """Print a message to stderr, in the first process only."""
    if rank():
        return
    print(text, file=sys.stderr, flush=True)


def emit(value: dict[str, Any]) -> None:
    """Print the JSON object of --json to stdout, in the first process only."""
    if rank():
        return
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def print_error(message: str, code: int, as_json: bool) -> None:
    """Print an error to stderr and, with --json, as a JSON object to stdout."""
    who = f"billhook, process {rank()} of {processes()}" if started() else "billhook"
    print(f"{who}: {message}", file=sys.stderr, flush=True)
    if as_json:
        with suppress(OSError):  # a stdout that cannot be written may be the error itself
            emit({"error": message, "exit_code": code})


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors of a command into a message and an exit code, printed by `print_error`."""

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
    """Yield a function that says whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt."""
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


def announce(estimate: "Estimate", device: str) -> None:
    """Print what a job needs, and a note if less memory is free."""
    from billhook.steps.estimate import free_gib

    say(f"About {estimate.memory_gib:.2f} GiB of memory and {estimate.disk_gib:.2f} GiB of disk.")
    if estimate.seconds is not None:
        say(f"About {duration(estimate.seconds)} to prune and write, measured on {estimate.measured}.")
    free = free_gib(device)
    if free is not None and free < estimate.memory_gib:
        advice = "use fewer --samples, a shorter --length, a smaller --batch-size or a smaller --spill-gib."
        say(f"note: only {free:.2f} GiB of memory are free: {advice}")


def layers_a_block(layers: "Sequence[Layer]") -> int:
    """The average number of these layers in a block."""
    return max(1, len(layers) // len({layer.block for layer in layers}))


def duration(seconds: float) -> str:
    """A duration for people, in seconds, minutes or hours."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{seconds:.{1 if seconds < 10 else 0}f} s"


class TimeLeft:
    """The time left in a job of `total` items, updated whenever `unit` of them are finished; str() is what to show.

    The unit of pruning is the layers of a block: most of a block's time passes before its first layer is finished. The
    first `skipped` items were finished by an earlier run. Between updates the time left counts down to zero.
    """

    def __init__(self, total: int | None, unit: int = 1, skipped: int = 0) -> None:
        self._total, self._unit, self._skipped = total, unit, skipped
        self._start = self._last = time.monotonic()
        self.done = self._counted = 0

    def advance(self) -> None:
        """Count a finished item."""
        self.done += 1
        if self.done <= self._skipped:
            self._start = time.monotonic()
        elif self.done % self._unit == 0 or self.done == self._total:
            self._counted, self._last = self.done - self._skipped, time.monotonic()

    @property
    def seconds(self) -> float | None:
        """Seconds left; None if the total is unknown or no unit is finished yet."""
        if self._total is None or self._counted <= 0:
            return None
        rate = (self._last - self._start) / self._counted
        left = rate * (self._total - self._skipped - self._counted)
        return max(0.0, left - (time.monotonic() - self._last))

    def __str__(self) -> str:
        return "" if self.seconds is None else f"about {duration(self.seconds)} left"


@contextmanager
def progress(what: str, total: int | None = None, *, unit: int = 1, skipped: int = 0) -> Iterator[Advance]:
    """Show a progress bar on a terminal and a line a minute elsewhere, both with the time left (see `TimeLeft`).

    Yields a function to call with the name of each finished item. Elsewhere means a file, a pipe, a terminal without
    cursor control, and a notebook, where the bar would need widgets.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console, left = Console(stderr=True), TimeLeft(total, unit, skipped)
    if not console.is_terminal or console.is_jupyter or console.is_dumb_terminal or rank():
        yield _lines(what, total, left)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    fields = TextColumn("{task.fields[left]} {task.fields[item]}")  # the time left is computed whenever it is shown
    with Progress(*columns, fields, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, item="", left=left)

        def advance(item: str) -> None:
            left.advance()
            bar.update(task, advance=1, item=item)

        yield advance


def _lines(what: str, total: int | None, left: TimeLeft) -> Advance:
    """Progress as plain lines, at most one every `EVERY` seconds."""
    last = time.monotonic()

    def advance(item: str) -> None:
        nonlocal last
        left.advance()
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            of = "" if total is None else f" of {total}"
            say(", ".join(part for part in (f"{what}: {left.done}{of}", str(left), item) if part))

    return advance


def table(title: str, header: list[str], rows: list[list[str]], numeric_from: int = 1) -> None:
    """Print a table to stdout, in the first process only; columns from `numeric_from` on are right-aligned."""
    if rank():
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for position, name in enumerate(header):
        grid.add_column(name, justify="right" if position >= numeric_from else "left", no_wrap=position == 0)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
