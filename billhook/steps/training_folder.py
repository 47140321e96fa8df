"""An output directory while its model is trained: OUTPUT.partial with the state of the run.

After every measurement the weights, the state of the optimizer and the best weights so far are written to a new file,
which is recorded in `billhook.unfinished.json`; then the file before is deleted. A run that ends at any moment can thus
go on after the last measurement, with the same bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from billhook.distributed.collectives import any_rank, barrier, gather
from billhook.distributed.torchrun import rank
from billhook.errors import BillhookError
from billhook.recovery.training import Saved
from billhook.recovery.training import State as Training
from billhook.steps.state import STATE, State, partial_folder, write_state
from billhook.steps.unfinished_folder import empty_folder, unfinished_folder
from billhook.store.files import replace_file, sha256
from billhook.store.layout import TRAINING
from billhook.store.output import flush, put_in_place

_BEST = "best:"


@dataclass
class TrainingFolder:
    """A locked folder and the state of its run. Where parameters are sharded, `each` process writes what it has."""

    folder: Path
    output: Path
    state: State
    stopping: Callable[[], bool]
    each: bool = False

    @property
    def worth_keeping(self) -> bool:
        """Whether the state of a training was saved."""
        return bool(self.state.files)

    @property
    def reached(self) -> str:
        """The last measurement."""
        return f"The run is at {self.state.progress} and"

    def decide(self, **facts: Any) -> None:
        """Record what was decided once, such as the rate."""
        self.state = replace(self.state, plan={**self.state.plan, **facts})
        if not rank():
            write_state(self.folder, self.state)

    def save(self, saved: Saved, steps: int) -> None:
        """Record the state of the training of so many steps; raises KeyboardInterrupt if the run is to stop here."""
        self.state = replace(self.state, progress=f"step {saved.state.steps} of {steps}")
        mine = self._written(saved) if self.each or not rank() else {}
        before, files = self.state.files, {name: digest for part in gather(mine) for name, digest in part.items()}
        self.state = replace(self.state, files=files)
        if not rank():
            write_state(self.folder, self.state)
            for old in before.keys() - files.keys():
                (self.folder / old).unlink(missing_ok=True)
        if any_rank(self.stopping()) and saved.state.steps < steps:
            raise KeyboardInterrupt

    def _written(self, saved: Saved) -> dict[str, str]:
        """Write the file of this process; its name and digest."""
        name = f"{saved.state.steps}.{f'{rank()}.' if self.each else ''}{TRAINING}"
        tensors = {**saved.optimizer, **{f"{_BEST}{key}": value for key, value in saved.best.items()}}
        about = {"state": json.dumps(asdict(saved.state))}
        replace_file(self.folder / name, lambda temporary: save_file(tensors, temporary, about))
        return {name: sha256(self.folder / name)}

    def saved(self) -> Saved | None:
        """What the run goes on with; None at its beginning. Raises BillhookError where the file was changed."""
        for name, digest in self.state.files.items():
            if self.each and name.split(".")[1] != str(rank()):
                continue
            path = self.folder / name
            if not path.is_file() or sha256(path) != digest:
                raise BillhookError(f"{path} is missing or was changed: start again with --overwrite.")
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            losses = {int(step): loss for step, loss in about["losses"].items()}
            best = {key.removeprefix(_BEST): value for key, value in tensors.items() if key.startswith(_BEST)}
            own = {key: value for key, value in tensors.items() if not key.startswith(_BEST)}
            return Saved(Training(**{**about, "losses": losses}), own, best)
        return None

    def complete(self, write: Callable[[Path], object]) -> None:
        """Write the result with `write`, which is called with the folder, and rename the directory, in one process."""
        barrier()
        if not rank():
            write(self.folder)
            flush(self.folder)
            for name in self.state.files:
                (self.folder / name).unlink()  # last, because a run without it cannot be resumed
            put_in_place(self.folder, self.output)
            (self.output / STATE).unlink(missing_ok=True)
        barrier()


@contextmanager
def training_folder(
    source: Path,
    output: Path,
    identity: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    room: int,
    stopping: Callable[[], bool] = lambda: False,
    each: bool = False,
) -> Iterator[TrainingFolder]:
    """Create the folder, or open it again to resume a run; `room` bytes are needed.

    Raises BillhookError where another run uses the folder, or the run to resume has another identity; Interrupted for a
    run that was stopped, or ran out of disk or memory, after something was saved. After other errors, which would occur
    again, the folder is deleted. Of several processes the first one writes, or `each` its own part, and the others have
    its state.
    """
    folder = partial_folder(output)
    if rank():
        yield TrainingFolder(folder, output, gather(State({}, {}, 0, [], []))[0], stopping, each)
        return
    with unfinished_folder(output, [], room) as unfinished:
        new = State(dict(identity), {}, 0, [""], [])
        state = unfinished.start(new, source, resume=resume, overwrite=overwrite, room=room)
        empty_folder(folder, [STATE, *state.files])
        gather(state)
        found = TrainingFolder(folder, output, state, stopping, each)
        unfinished.run = found
        yield found
