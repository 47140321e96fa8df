"""Run the command line inside the test process, as a shell would see it."""

import contextlib
import io
import json
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

from billhook.cli import main

TEXT = ("--calibration", "text.txt", "--samples", "4", "--length", "32")
PRUNE = ("prune", "model", "--output", "pruned", "--sparsity", "0.5", *TEXT, "--criterion", "wanda")
MAGNITUDE = ("prune", "model", "--output", "pruned", "--criterion", "magnitude")
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


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
    """Run `billhook ARGUMENTS`; it must not end in an internal error."""
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
    assert "Internal error" not in err.getvalue(), err.getvalue()
    return Ran(code, out.getvalue(), err.getvalue())


def done(*arguments: Any) -> Ran:
    """Run a command that must succeed."""
    ran = billhook(*arguments)
    assert ran.code == 0, ran.err
    return ran


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too: path -> content (None for a directory)."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def edit(path: str, **changes: object) -> None:
    """Change entries of a json file."""
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(content | changes))


def workplace(folder: Path) -> Path:
    """A folder with a model, a text, a table and a plan, all in order."""
    tiny.save(folder / "model", tiny.llama(num_hidden_layers=2))
    tiny.text_file(folder / "text.txt", 40)
    done("measure", folder / "model", "-o", folder / "table.json")
    done("plan", folder / "table.json", "--allocator", "uniform", "--sparsity", "0.5", "-o", folder / "plan.json")
    return folder


def refused(place: Path, *arguments: str, match: str, code: int = 2) -> None:
    """Run a command that must fail: said in one or two lines on stderr and one object on stdout, with nothing written
    or left."""
    before = listing(place)
    ran = billhook(*arguments, "--json")
    assert ran.code == code, ran.err
    said = "".join(
        line for line in ran.err.splitlines(keepends=True) if not line.startswith(("Computing on ", "About "))
    )  # device, dtype and estimate
    assert 1 <= len(said.splitlines()) <= 2
    assert len(said) < 700
    assert re.search(match, said), ran.err
    assert ran.json == {"error": said.strip().removeprefix("billhook: "), "exit_code": code}
    assert listing(place) == before
