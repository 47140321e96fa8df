"""The command line: one module per command, which imports nothing heavy before its command runs.

Exit codes: 0 done, 1 the job failed, 2 wrong usage. With --json exactly one JSON object goes to stdout, all else to
stderr.
"""

import functools
import os
import re
import sys
from io import TextIOWrapper
from typing import Any

import typer

from billhook import __version__, signals
from billhook.cli import (
    bench,
    compare,
    compress,
    demo,
    evaluate,
    export,
    generate,
    gradients,
    imatrix,
    ls,
    measure,
    pack,
    plan,
    plot,
    prune,
    quantize,
    recover,
    report,
    search,
    slim,
    unpack,
    verify,
)
from billhook.cli.common import Failure, handle_errors, print_error
from billhook.cli.layout import Command, Commands
from billhook.cli.options import grouped
from billhook.distributed.torchrun import started

_UsageError: Any = typer.BadParameter.__bases__[0]  # click's class; typer bundles a copy of click since 0.27

_INTERRUPTED = 130  # what typer returns for a KeyboardInterrupt outside of a command
_DISTRIBUTED = ("measure", "prune", "recover", "slim")  # commands that run in several processes under torchrun
REMOVED = {  # removed commands and options, and what to use instead
    "analyze": "billhook compare MODEL --plans PLAN,PLAN --errors --data SOURCE --output DIR",
    "write": "a calibration SOURCE that begins with self: (--calibration self:)",
    "--preset": "--recipe, which takes the names of presets (owl/llama@70 is owl@70 now)",
    "--rounding": "--published",
    "--sampling": "--published",
    "--mode": "--published",
    "--finalists": "--budget, the number of plans to try, each of which is now pruned in full",
}

app = typer.Typer(
    name="billhook",
    help="Make trained models smaller: prune, quantize, slim and recover them, with as little loss as possible.",
    epilog="First run: billhook demo.  Your own model: "
    "billhook compress MODEL --bits 4.5 --calibration text.txt --output small",
    invoke_without_command=True,
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_FIRST = (compress, prune, quantize, slim, recover, search, measure, gradients, plan, evaluate, compare, report, verify)
for module in (*_FIRST, pack, unpack, export, imatrix, generate, bench, ls, demo, plot):
    app.command(module.NAME, cls=Command, epilog=module.EXAMPLES)(handle_errors(grouped(module.command)))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"billhook {__version__}")
        raise typer.Exit


_VERSION = typer.Option(False, "--version", help="Print the version and stop.", callback=_version, is_eager=True)


@app.callback()
def _root(context: typer.Context, version: bool = _VERSION) -> None:
    command = context.invoked_subcommand
    if started() and command not in _DISTRIBUTED:
        commands = " and ".join([", ".join(_DISTRIBUTED[:-1]), _DISTRIBUTED[-1]])
        print_error(f"{command} runs in one process: start it without torchrun ({commands} run in several).", 2, False)
        raise typer.Exit(2)
    if command is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@functools.cache
def _program() -> Any:
    """All commands with their options as click has them, built once in a process."""
    return typer.main.get_command(app)


def _explained(message: str, command: str) -> str:
    """A message about wrong usage, and what to do."""
    unknown = re.match(r"No such (?:command|option):? '?([\w-]+)", message)
    if unknown and unknown[1] in REMOVED:
        return f"{unknown[1]} was removed. Use {REMOVED[unknown[1]]}."
    stop = "" if message.endswith((".", "?")) else "."
    return f"{message}{stop} See: {command} --help"


def main() -> None:
    """Run the command line; a mistake or failure is one message on stderr and an exit code, never a traceback."""
    # set before torch is loaded: threads that spin while they wait would slow down those that compute
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signals.install()
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.encoding.lower() == "utf-8":
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are not UTF-8, as on stderr
    try:
        code = _program()(prog_name="billhook", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Failure as failure:
        code = failure.exit_code
    except _UsageError as error:
        code = 2
        command = error.ctx.command_path if error.ctx else "billhook"
        print_error(_explained(error.format_message(), command), code, "--json" in sys.argv)
    if code == _INTERRUPTED:  # before or after the command itself, which says what it leaves behind
        code = 1
        print_error(signals.STOPPED, code, "--json" in sys.argv)
    sys.exit(code or 0)
