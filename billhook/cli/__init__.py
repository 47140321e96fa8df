"""The command line: one file a command, nothing heavy imported until a command runs.

Exit codes: 0 done, 1 the job failed, 2 wrong usage. With --json exactly one JSON object goes to stdout, all else to stderr.
"""

import sys

import typer

from billhook import __version__
from billhook.cli import demo, evaluate, ls, measure, plan, prune, verify
from billhook.cli.common import Failure

app = typer.Typer(
    name="billhook",
    help="Prune large language models layer by layer: measure, allocate, prune, evaluate, verify.",
    epilog="First run: billhook demo.  Your own model: billhook prune MODEL --sparsity 0.5 --calibration text.txt --output pruned",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for module in (prune, measure, plan, evaluate, verify, ls, demo):
    app.command(module.NAME, epilog=module.EXAMPLES)(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"billhook {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.", callback=_version, is_eager=True)) -> None:
    pass


def main() -> None:
    """Run the command line; a mistake or failure is one message on stderr and an exit code, never a traceback."""
    try:
        app()
    except Failure as failure:
        sys.exit(failure.exit_code)
