"""The state of an unfinished run: billhook.unfinished.json in OUTPUT.partial (`billhook.steps.partial_output`)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from billhook.engine.loop import LayerResult
from billhook.errors import BillhookError
from billhook.store.files import json_text, read_json, replace_file
from billhook.store.layout import PARTIAL
from billhook.store.layout import UNFINISHED as STATE
from billhook.store.output import absolute
from billhook.store.typed_json import typed

VERSION = 1
_ADVICE = (
    "This directory is not finished. Continue with the same command and --resume, or start again with --overwrite."
)


@dataclass(frozen=True)
class State:
    """The state of a run. The fields are those of billhook.unfinished.json.

    * `unfinished` (string): how to continue.
    * `version` (integer): 1.
    * `identity`: what the result depends on: versions, digests of model, data and given files, all options, number of
      processes. A run that differs in any of these is refused.
    * `plan`: the plan, so that nothing is measured again.
    * `blocks`: number of blocks.
    * `digests`: SHA-256 of the values outside the blocks, then of each finished block; they are checked when the run is
      resumed, and pruning starts at the first changed block.
    * `results` (list of lists): what was done to each layer of each finished block.
    * `files`: SHA-256 of other files that the blocks are made with (gradients), or of the state of a training run.
    * `progress` (string, optional): how far a training run is.
    """

    identity: dict[str, Any]
    plan: dict[str, Any]
    blocks: int
    digests: list[str]
    results: list[list[LayerResult]]
    files: dict[str, str] = field(default_factory=dict)
    progress: str = ""

    @property
    def done(self) -> int:
        """Finished blocks."""
        return len(self.results)


def partial_folder(output: Path) -> Path:
    """The folder in which the directory `output` is written."""
    return output.with_name(f"{output.name}{PARTIAL}")


def unfinished_run(output: Path, *, resume: bool, overwrite: bool) -> State | None:
    """The state of the unfinished run to continue, None to start from the beginning; `output` is resolved.

    Raises BillhookError for an unfinished run where neither `resume` nor `overwrite` is true.
    """
    if output.is_dir():
        (output / STATE).unlink(missing_ok=True)  # of a run that ended between its last two steps
    folder = partial_folder(output)
    if not (folder / STATE).exists() or (overwrite and not resume):
        return None
    state = read_state(folder)
    if not resume:
        done = f"{folder} holds an unfinished run ({state.progress or f'{state.done} of {state.blocks} blocks'})"
        raise BillhookError(f"{done}. Continue it with --resume, or start again with --overwrite.")
    return state


def finished_items(output: str | Path | None, resume: bool) -> int:
    """How many layers (or units) the run to be continued has finished; 0 for a new run."""
    folder = None if output is None else partial_folder(absolute(output))
    if not resume or folder is None or not (folder / STATE).exists():
        return 0
    return sum(map(len, read_state(folder).results))


def write_state(folder: Path, state: State) -> None:
    """Replace the state in the folder of an unfinished run, atomically."""
    text = json_text({"unfinished": _ADVICE, "version": VERSION, **asdict(state)})
    replace_file(folder / STATE, lambda temporary: temporary.write_bytes(text.encode()))


def read_state(folder: Path) -> State:
    """The state of an unfinished run; raises BillhookError for a damaged one."""
    value = read_json(folder / STATE, "state of a run")
    where = f"{folder / STATE} is damaged (start again with --overwrite)"
    if value.get("version") != VERSION:
        raise BillhookError(f"{where}: its version is {value.get('version')!r:.40}, not {VERSION}.")
    state: State = typed(State, value, where)
    if len(state.digests) != 1 + state.done or state.done > state.blocks:
        raise BillhookError(f"{where}: the numbers of blocks, digests and results contradict each other.")
    return state


def check_same_run(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise BillhookError naming what differs between the run in `folder` and the one that would continue it."""
    for key in dict.fromkeys([*found, *wanted]):
        if found.get(key) != wanted.get(key):
            change = f"its {key} was {found.get(key)!r:.100}, now it is {wanted.get(key)!r:.100}"
            raise BillhookError(
                f"The unfinished run in {folder} cannot be continued: {change}. Run it as before, or start again with "
                "--overwrite."
            )
