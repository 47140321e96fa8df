"""Run the command line inside the test process, as a shell would see it."""

import contextlib
import io
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command left behind: its exit code and what it wrote on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout; anything else there is an error."""
        return json.loads(self.out)


def billhook(*arguments: Any) -> Ran:
    """Run `billhook ARGUMENTS`; an exception that would show as a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    before, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["billhook", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def done(*arguments: Any) -> Ran:
    """Run a command that must succeed."""
    ran = billhook(*arguments)
    assert ran.code == 0, ran.err
    return ran


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too: path -> content (None for a directory)."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
