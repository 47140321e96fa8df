"""What the commands share: progress, output, and turning errors into messages and exit codes."""

import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from billhook.distributed.torchrun import processes, rank, started
from billhook.errors import BillhookError, on_command_line, out_of_memory
from billhook.signals import STOPPED
from billhook.store.files import in_one_line, json_text

if TYPE_CHECKING:
    from billhook.architectures.layers import Layer
    from billhook.plan.plan import Plan
    from billhook.steps.estimate import Estimate

EVERY = 60.0  # seconds between lines of progress
Number = TypeVar("Number", int, float)
Advance = Callable[[str], None]  # called with the name of each finished item


class Failure(Exception):
    """Ends a command whose error has been printed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def say(text: str) -> None:
    """Print a message on stderr, from the first process only."""
    if not rank():
        print(text, file=sys.stderr, flush=True)


def say_notes(notes: Iterable[str]) -> None:
    """Print what the user should know of a run."""
    for note in notes:
        say(f"note: {note}")


def say_next(output: Path) -> None:
    """Print what to do with the result of a run."""
    say(f"Check it: billhook verify {output}   Score it: billhook eval {output} --data SOURCE")


def emit(value: dict[str, Any]) -> None:
    """Print the JSON object of --json on stdout, from the first process only."""
    if not rank():
        print(json_text(value, indent=None), end="", flush=True)


def print_error(message: str, code: int, as_json: bool) -> None:
    """Print an error on stderr and, with --json, as a JSON object on stdout."""
    who = f"billhook, process {rank()} of {processes()}" if started() else "billhook"
    print(f"{who}: {message}", file=sys.stderr, flush=True)
    if as_json:
        with suppress(OSError):  # a stdout that cannot be written may be the error itself
            emit({"error": message, "exit_code": code})


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command that prints its errors and raises `Failure` with their exit code.

    No error shows a traceback unless the environment variable BILLHOOK_DEBUG is set.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with on_command_line():
                return command(*args, **kwargs)
        except Failure:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("BILLHOOK_DEBUG"):
                traceback.print_exc()
            with on_command_line():
                message, code = _explained(error)
        print_error(message, code, bool(kwargs.get("as_json")))
        raise Failure(code)

    return run


def _explained(error: BaseException) -> tuple[str, int]:
    """The message and the exit code for an error that ended a command."""
    if isinstance(error, BillhookError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, 1
    if isinstance(error, OSError):
        where = "standard output" if error.filename is None else str(error.filename)[:200]
        return f"Cannot read or write {where}: {error.strerror or error}.", 1
    if out_of_memory(error):
        return "Out of memory. Use fewer --samples, a shorter --length or a smaller --batch-size.", 1
    place = traceback.extract_tb(error.__traceback__)[-1]
    found = f"Internal error at {Path(place.filename).name}:{place.lineno}, {in_one_line(error)}"
    return f"{found}. Please report it with the traceback, which the same command prints with BILLHOOK_DEBUG=1.", 1


@contextmanager
def graceful_interrupt(unit: str = "block") -> Iterator[Callable[[], bool]]:
    """Record the first Ctrl-C, and raise KeyboardInterrupt at the second; yields a function: was Ctrl-C pressed?"""
    signals: list[int] = []

    def record(number: int, frame: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        say(f"Stopping after this {unit}. Press Ctrl-C again to stop at once; finished {unit}s are kept either way.")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, record)
    try:
        yield lambda: bool(signals)
    finally:
        signal.signal(signal.SIGINT, before)


def parse_settings(pairs: list[str] | None) -> dict[str, str]:
    """Split KEY=VALUE arguments; raises BillhookError for one without '=' or given twice."""
    settings: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise BillhookError(f"--set {pair}: write KEY=VALUE; billhook ls lists the options of every method.")
        if key in settings:
            raise BillhookError(f"--set {key} is given twice.")
        settings[key] = value
    return settings


def split_list(text: str | None) -> list[str]:
    """The names in a list separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def numbers(text: str, kind: Callable[[str], Number], option: str, example: str) -> list[Number]:
    """The numbers in a list separated by commas; raises BillhookError for anything else."""
    try:
        return [kind(part) for part in split_list(text)]
    except (ValueError, typer.BadParameter):  # a reader of options raises the latter
        raise BillhookError(f"{option} {text}: write numbers separated by commas, such as {example}.") from None


def load_plans(paths: Sequence[Path]) -> dict[str, "Plan"]:
    """Plans by the stems of their file names; raises BillhookError where two are the same."""
    from billhook.plan.plan import load_plan

    plans = {path.stem: load_plan(path) for path in paths}
    if len(plans) < len(paths):
        raise BillhookError("Two plans have the same file name, which is the plan's name in the output: rename one.")
    return plans


def announce(estimate: "Estimate", device: str) -> None:
    """Print what a job needs before it starts, with a note where less memory is free than it needs."""
    from billhook.store.compute import free_gib

    say(f"About {estimate.memory_gib:.2f} GiB of memory and {estimate.disk_gib:.2f} GiB of disk.")
    if estimate.seconds is not None:
        say(f"About {duration(estimate.seconds)} of work, measured on {estimate.measured}.")
    free = free_gib(device)
    if free is not None and free < estimate.memory_gib:
        advice = "use fewer --samples, a shorter --length, a smaller --batch-size or a smaller --spill-gib."
        say(f"note: only {free:.2f} GiB of memory are free: {advice}")


def layers_per_block(layers: "Sequence[Layer]") -> int:
    """The average number of layers to work on in a block."""
    return max(1, len(layers) // len({layer.block for layer in layers}))


def duration(seconds: float) -> str:
    """A duration with two or three digits, in seconds, minutes or hours."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{seconds:.{1 if seconds < 10 else 0}f} s"


class TimeLeft:
    """The time left of a job of `total` items, estimated again after every `unit` items; `str` is the text to show.

    A unit is the layers of a block, because most of a block's time passes before its first layer is finished. The first
    `skipped` items were finished by an earlier run. Between two units the time counts down to zero.
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
        """Seconds left; None where the total is not known, or no unit is finished yet."""
        if self._total is None or self._counted <= 0:
            return None
        rate = (self._last - self._start) / self._counted
        left = rate * (self._total - self._skipped - self._counted)
        return max(0.0, left - (time.monotonic() - self._last))

    def __str__(self) -> str:
        return "" if self.seconds is None else f"about {duration(self.seconds)} left"


@contextmanager
def progress(what: str, total: int | None = None, *, unit: int = 1, skipped: int = 0) -> Iterator[Advance]:
    """Show progress; yields a function to call with the name of each finished item. See `TimeLeft` for the arguments.

    A terminal gets a bar; a file, a pipe, a dumb terminal or a notebook (where a bar needs widgets) a line per minute.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console, left = Console(stderr=True), TimeLeft(total, unit, skipped)
    if not console.is_terminal or console.is_jupyter or console.is_dumb_terminal or rank():
        yield _lines(what, total, left)
        return
    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[left]} {task.fields[item]}"),  # the time left is computed whenever it is shown
        console=console, transient=True,
    )  # fmt: skip
    with shown as bar:
        task = bar.add_task(what, total=total, item="", left=left)

        def advance(item: str) -> None:
            left.advance()
            bar.update(task, advance=1, item=item)

        yield advance


def _lines(what: str, total: int | None, left: TimeLeft) -> Advance:
    """Progress in plain lines, at most one per `EVERY` seconds."""
    last = time.monotonic()

    def advance(item: str) -> None:
        nonlocal last
        left.advance()
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            count = f"{left.done}" if total is None else f"{left.done} of {total}"
            say(", ".join(part for part in (f"{what}: {count}", str(left), item) if part))

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
