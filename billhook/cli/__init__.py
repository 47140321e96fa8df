"""The command line: one file a command, nothing heavy imported until a command runs.

Exit codes: 0 done, 1 the job failed, 2 wrong usage. With --json exactly one JSON object goes to stdout, all else to
stderr.
"""

import os
import re
import signal
import sys
from typing import Any

import typer

from billhook import __version__
from billhook.cli import (
    bench,
    compare,
    demo,
    evaluate,
    generate,
    gradients,
    ls,
    measure,
    pack,
    plan,
    plot,
    prune,
    report,
    search,
    unpack,
    verify,
)
from billhook.cli.common import Failure, print_error
from billhook.distributed.torchrun import started

_UsageError: Any = typer.BadParameter.__bases__[0]  # click's own, of which typer has a copy inside since 0.27

_SEVERAL = ("measure", "prune")  # commands that share their work under torchrun
# Commands and options that are no more, with what to use instead.
REMOVED = {
    "analyze": "billhook compare MODEL --plans PLAN,PLAN --errors --data SOURCE --output DIR",
    "write": "a calibration SOURCE that begins with self: (--calibration self:)",
    "--rounding": "--published",
    "--sampling": "--published",
    "--mode": "--published",
    "--finalists": "--budget, which says how many plans are tried: each of them is pruned in full now",
}

app = typer.Typer(
    name="billhook",
    help="Prune large language models layer by layer: measure, allocate, prune, evaluate, verify.",
    epilog="First run: billhook demo.  Your own model: "
    "billhook prune MODEL --sparsity 0.5 --calibration text.txt --output pruned",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_FIRST = (prune, search, measure, gradients, plan, evaluate, compare, report, verify)
for module in (*_FIRST, pack, unpack, generate, bench, ls, demo, plot):
    app.command(module.NAME, epilog=module.EXAMPLES)(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"billhook {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", callback=_version, is_eager=True
    ),
) -> None:
    if started() and context.invoked_subcommand not in _SEVERAL:
        print_error(
            f"{context.invoked_subcommand} runs in one process: start it without torchrun "
            f"({' and '.join(_SEVERAL)} run in several).",
            2,
            False,
        )
        raise typer.Exit(2)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _explained(message: str, command: str) -> str:
    """What is wrong with the usage of a command, and what to do."""
    unknown = re.match(r"No such (?:command|option):? '?([\w-]+)", message)
    if unknown and unknown[1] in REMOVED:
        return f"{unknown[1]} was removed. Use {REMOVED[unknown[1]]}."
    stop = "" if message.endswith((".", "?")) else "."
    return f"{message}{stop} See: {command} --help"


def main() -> None:
    """Run the command line; a mistake or failure is one message on stderr and an exit code, never a traceback."""
    # read when torch is loaded: threads that spin while they wait take the cores of those that compute
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # what a batch system sends ends a run as Ctrl-C does: tidily
    try:
        code = app(standalone_mode=False)
    except Failure as failure:
        code = failure.exit_code
    except _UsageError as error:
        code = 2
        command = error.ctx.command_path if error.ctx else "billhook"
        print_error(_explained(error.format_message(), command), code, "--json" in sys.argv)
    sys.exit(code or 0)
