"""An output directory while it is being written: OUTPUT.partial, renamed to OUTPUT when it is complete.

The weight files are created at the start, with everything outside the blocks. Each finished block is written to its
place and flushed to the disk, and only then recorded in `billhook.unfinished.json`, which is replaced atomically. A run
that ends at any moment, for any reason, can thus be resumed after the last recorded block. config.json is written after
the last block, so no program mistakes such a directory for a model. A run holds a lock on the directory, which the
system releases when the process ends.

Only a run with the same `identity` can be resumed. The bytes of every block are checked then; pruning starts again at
the first block whose bytes have changed.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from billhook.distributed.collectives import any_rank, barrier, gather
from billhook.distributed.torchrun import rank
from billhook.engine.loop import LayerResult
from billhook.engine.streaming import Stream
from billhook.engine.walk import Block
from billhook.errors import BillhookError, DiskFull, Interrupted, JobError, out_of_memory
from billhook.reports.publishing import publish
from billhook.steps.state import STATE, VERSION, State, check_same_run, partial_folder, unfinished_run
from billhook.store.directory import complete
from billhook.store.files import json_text, replace_file, sha256
from billhook.store.layout import GRADIENTS, LEVELS, WRITTEN
from billhook.store.output import check_output, failure, flush, put_in_place
from billhook.store.shards import INDEX, weight_bytes, weight_files
from billhook.store.sinks import BlockSink, SameLayout

_ADVICE = (
    "This directory is not finished. Continue with the same command and --resume, or start again with --overwrite."
)


class PartialOutput:
    """A locked directory that is being written block by block."""

    def __init__(
        self,
        stream: Stream,
        source: Path,
        output: Path,
        state: State,
        *,
        stopping: Callable[[], bool],
        files: BlockSink | None = None,
    ) -> None:
        self.stream, self.source, self.output, self.state, self.stopping = stream, source, output, state, stopping
        self.folder = partial_folder(output)
        self.sink: SameLayout | BlockSink = SameLayout(stream.model, source) if files is None else files
        inside = {name for names in stream.names for name in names}
        self.outside = [name for name in self.sink.entries if name not in inside]
        self._same_values = self._same_dtypes() if files is None else files.same_values

    def _same_dtypes(self) -> bool:
        """Whether the files have the dtypes of the model in memory."""
        assert isinstance(self.sink, SameLayout)
        tensors = (item for i in range(self.state.blocks) for item in self.sink.on_disk(self.stream.state(i)).items())
        return all(value.dtype == self.stream.stored[name].dtype for name, value in tensors)

    def _moved(self, index: int) -> None:
        """From now on read a block from the output."""
        if isinstance(self.sink, SameLayout):
            self.stream.moved(index, self.folder)
        else:
            self.sink.moved(self.folder, index)

    def begin(self) -> None:
        """Create the files, or check those of the run that is resumed."""
        done = self.state.done if self._begun() else None
        if done is not None:
            _empty(self.folder, [*self.sink.files, STATE, *self.state.files])
        else:
            self.sink.begin(self.folder, self.outside)
        digests = [self.sink.digest(self.folder, self.outside)]
        for index in range(done or 0):
            digests.append(self.sink.digest(self.folder, self.stream.names[index]))
            if digests[-1] != self.state.digests[len(digests) - 1]:
                digests.pop()
                break
            self._moved(index)
        files = {} if done is None else self.state.files
        self._update(digests=digests, results=self.state.results[: len(digests) - 1], files=files)

    def finished(self, block: Block, results: Sequence[LayerResult]) -> None:
        """Write and record a block; from then on the model reads it from the output.

        Raises KeyboardInterrupt if the run is to stop here.
        """
        made = [*self.state.results, list(results)]
        if rank():
            self.state = replace(self.state, results=made)
        else:
            self.sink.write(self.folder, self.stream.state(block.index))
            digest = self.sink.digest(self.folder, self.stream.names[block.index])
            self._update(digests=[*self.state.digests, digest], results=made)
        barrier()
        self._moved(block.index)
        if not self._same_values:
            self.stream.load(block.index, self.stream.stored)
        if any_rank(self.stopping()) and self.state.done < self.state.blocks:
            raise KeyboardInterrupt

    def add_file(self, name: str) -> None:
        """Record a file of the folder that the blocks depend on."""
        self._update(files={**self.state.files, name: sha256(self.folder / name)})

    def has_file(self, name: str) -> bool:
        """Whether a file that the blocks depend on is recorded."""
        return name in self.state.files

    def complete(
        self,
        record: Mapping[str, Any],
        finish: Callable[[Path], Mapping[str, Any]] | None = None,
        *,
        published: Callable[[Path], object] = publish,
        model: PreTrainedModel | None = None,
    ) -> None:
        """Write the other files and rename the directory, once no process reads from it any more.

        `finish` completes the weight files in a folder, and returns new entries of config.json. `published` writes the
        report. `model` is the model that was written, where it is not the source's.
        """
        barrier()
        if not rank():
            config = None if finish is None else finish(self.folder)
            complete(model or self.stream.model, self.source, self.folder, record, published, config)
            flush(self.folder)
            for path in [*self.folder.glob(f"*{GRADIENTS}"), *self.folder.glob(WRITTEN)]:
                path.unlink()  # last, because a run without them cannot be resumed
            put_in_place(self.folder, self.output)
            (self.output / STATE).unlink(missing_ok=True)
        barrier()

    def _begun(self) -> bool:
        """Whether all files exist, with the layout of the source and its values outside the blocks."""
        files, digests = self.state.files.items(), self.state.digests
        whole = all((self.folder / name).is_file() and sha256(self.folder / name) == digest for name, digest in files)
        begun = whole and bool(digests) and self.sink.begun(self.folder)
        return begun and self.sink.digest(self.folder, self.outside) == digests[0]

    def _update(self, **changes: Any) -> None:
        state = replace(self.state, **changes)
        text = json_text({"unfinished": _ADVICE, "version": VERSION, **asdict(state)})
        replace_file(self.folder / STATE, lambda temporary: temporary.write_bytes(text.encode()))
        self.state = state


@contextmanager
def partial_output(
    stream: Stream,
    source: Path,
    output: Path,
    identity: Mapping[str, Any],
    plan: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    stopping: Callable[[], bool] = lambda: False,
    files: BlockSink | None = None,
    room: int | None = None,
) -> Iterator[PartialOutput]:
    """Create the directory, or open it again to resume a run.

    The files have the source's layout, or are `files`, and need `room` bytes (None: as many as the source's). The run
    ends after a block at which `stopping()` is true. Raises BillhookError where another run uses the directory, or the
    run to resume has another identity; Interrupted for a run that was stopped, or ran out of disk or memory, after some
    blocks. After other errors, which would occur again, the directory is deleted.
    """
    folder = partial_folder(output)
    if rank():
        begun = gather(State({}, {}, len(stream.blocks), [], []))[0]
        for index in range(begun.done):
            stream.moved(index, folder)
        yield PartialOutput(stream, source, output, begun, stopping=stopping)
        return
    lock = _lock(folder)
    foreign = _foreign_file(folder, [file.name for file in weight_files(source)] if files is None else files.files)
    keep = (folder / STATE).exists() or bool(foreign)
    partial: PartialOutput | None = None
    try:
        if foreign:
            raise BillhookError(
                f"{folder}, where {output} would be written, holds {foreign}, which is not from a run: move the folder "
                "away."
            )
        state = unfinished_run(output, resume=resume, overwrite=overwrite)
        check_output(output, source, overwrite=overwrite)
        if state is None:
            keep = False
            _empty(folder)
            state = State(dict(identity), dict(plan), len(stream.blocks), [], [])
        check_same_run(state.identity, identity, folder)
        partial = PartialOutput(stream, source, output, state, stopping=stopping, files=files)
        partial.begin()
        gather(partial.state)
        yield partial
    except (KeyboardInterrupt, OSError, MemoryError, RuntimeError, Interrupted, DiskFull) as error:
        keep = keep or (partial is not None and bool(partial.state.done or partial.state.files))
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        raise _interrupted(error, room or weight_bytes(source), output, partial if keep else None) from None
    except BillhookError:
        keep = keep and partial is None
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _interrupted(error: BaseException, needed: int, output: Path, kept: PartialOutput | None) -> BaseException:
    """The error for a run that ended early; it says how to resume the run if its directory is `kept`, or how many
    bytes are `needed`."""
    if kept is None and not isinstance(error, OSError):
        return error
    what = "Stopped"
    if isinstance(error, OSError | SafetensorError):
        what = failure(error, output, needed).rstrip(".")
    elif isinstance(error, MemoryError | RuntimeError):
        what = "Out of memory"
    elif isinstance(error, Interrupted | DiskFull):
        what = str(error).rstrip(".")
    if kept is None:
        return JobError(f"{what}. Nothing was left behind.")
    done = f"{kept.state.done} of {kept.state.blocks} blocks are finished and kept in {kept.folder}"
    return Interrupted(f"{what}. {done}: continue with the same command and --resume.")


def _lock(folder: Path) -> int:
    """Create the folder and lock it until the process ends; raises BillhookError when another process has locked it."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            place = f"{folder}, where the output would be written,"
            raise BillhookError(f"{place} is a file: move it away, or choose another output.") from None
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise BillhookError(f"Another run is writing {folder}: wait for it, or choose another output.") from None
        except FileNotFoundError:  # the other run has just renamed the folder
            pass
        os.close(handle)


def _foreign_file(folder: Path, written: Collection[str]) -> str | None:
    """The name of a file in `folder` that cannot be from an unfinished run and must not be deleted."""
    if (folder / STATE).exists():
        return None
    own, temporary = {INDEX, LEVELS, *written}, (f".{STATE}.", f".{LEVELS}.")
    names = (path.name for path in folder.iterdir())
    return min((name for name in names if name not in own and not name.startswith(temporary)), default=None)


def _empty(folder: Path, except_for: Sequence[str] = ()) -> None:
    for path in folder.iterdir():
        if path.name in except_for:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
