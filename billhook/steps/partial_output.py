"""A pruned directory in the making: OUTPUT.partial, which takes the name OUTPUT when all of it is written.

The weight files are laid out as in the source at the start, with everything that lies outside the blocks; each pruned
block is written to its place and forced to the disk, and only then noted in `billhook.unfinished.json`, which is
replaced as a whole. A run that ends at any moment, by whatever means, can thus be continued after the last block noted.
config.json comes after the last block and billhook.json last of all, so nothing takes such a directory for a model.
While a run lives it holds a lock on the directory, which the system takes away when the process ends.

The state says what the run was asked for (`identity`): it is continued by the same run only. Each block's bytes are
checked when a run is continued; the first one that is not as it was written is pruned again.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from billhook.distributed.collectives import any_rank, barrier, gather
from billhook.distributed.torchrun import rank
from billhook.engine.loop import LayerResult
from billhook.engine.streaming import Stream
from billhook.engine.walk import Block
from billhook.errors import BillhookError, Interrupted, JobError, out_of_memory
from billhook.reports.publishing import publish
from billhook.steps.state import STATE, VERSION, State, check_place, check_same_run, partial_folder
from billhook.store.files import digest_ranges, fsync, json_text, replace_file, sha256
from billhook.store.layout import GRADIENTS
from billhook.store.output import check_output, failure, flush, put_in_place
from billhook.store.shards import INDEX, read_shard, weight_files
from billhook.store.sinks import complete, lay_out_all, on_disk, write_tensors

_ADVICE = (
    "This directory is not finished. Continue with the same command and --resume, or start again with --overwrite."
)


class PartialOutput:
    """A locked directory in the making; `finished` notes a block, `complete` ends it."""

    def __init__(self, stream: Stream, source: Path, output: Path, state: State, stopping: Callable[[], bool]) -> None:
        self.stream, self.source, self.output, self.state, self.stopping = stream, source, output, state, stopping
        self.folder = partial_folder(output)
        self.shards = [read_shard(file) for file in weight_files(source)]
        inside = {name for names in stream.names for name in names}
        self.outside = [name for shard in self.shards for name in shard.entries if name not in inside]
        self._exact = all(
            value.dtype == stream.stored[name].dtype
            for i in range(state.blocks)
            for name, value in self._on_disk(i).items()
        )

    def begin(self) -> None:
        """Lay the files out, or check those of a run that is continued."""
        kept = self.state.done if self._laid_out() else None
        if kept is not None:
            _empty(self.folder, [*(shard.path.name for shard in self.shards), INDEX, STATE, *self.state.files])
        else:
            lay_out_all(self.shards, self.source, self.folder, set(self.outside).__contains__)
            for shard in self.shards:
                fsync(self.folder / shard.path.name)
        digests = [self._digest(self.outside)]
        for index in range(kept or 0):
            digests.append(self._digest(self.stream.names[index]))
            if digests[-1] != self.state.digests[len(digests) - 1]:
                digests.pop()
                break
            self.stream.moved(index, self.folder)
        self._note(
            digests=digests,
            results=self.state.results[: len(digests) - 1],
            files={} if kept is None else self.state.files,
        )

    def finished(self, block: Block, results: Sequence[LayerResult]) -> None:
        """Write a block and note it; from then on the model has it as it is on disk. Raises KeyboardInterrupt if it was
        to stop here."""
        made = [*self.state.results, list(results)]
        if rank():
            self.state = replace(self.state, results=made)
        else:
            write_tensors(self.shards, self.folder, self._on_disk(block.index))
            digest = self._digest(self.stream.names[block.index])
            self._note(digests=[*self.state.digests, digest], results=made)
        barrier()
        self.stream.moved(block.index, self.folder)
        if not self._exact:
            self.stream.load(block.index, self.stream.stored)
        if any_rank(self.stopping()) and self.state.done < self.state.blocks:
            raise KeyboardInterrupt

    def keep(self, name: str) -> None:
        """Note a file of the folder that the blocks are made with."""
        self._note(files={**self.state.files, name: sha256(self.folder / name)})

    def has(self, name: str) -> bool:
        """Whether that file is there as it was noted."""
        return name in self.state.files

    def complete(self, record: Mapping[str, Any]) -> None:
        """Write all that is left and give the directory its name, once no process reads from it any more."""
        barrier()
        if not rank():
            complete(self.stream.model, self.source, self.folder, record, publish=publish)
            flush(self.folder)
            for path in self.folder.glob(f"*{GRADIENTS}"):  # last, because a run without them cannot be continued
                path.unlink()
            put_in_place(self.folder, self.output)
            (self.output / STATE).unlink(missing_ok=True)
        barrier()

    def _on_disk(self, index: int) -> Mapping[str, Any]:
        return on_disk(self.stream.model, self.stream.state(index), self.shards)

    def _laid_out(self) -> bool:
        """Whether all files are there, with the layout of the source and the values outside the blocks."""
        for shard in self.shards:
            try:
                there = read_shard(self.folder / shard.path.name)
            except BillhookError:
                return False
            if there.header != shard.header:
                return False
        for name, digest in self.state.files.items():
            if not (self.folder / name).is_file() or sha256(self.folder / name) != digest:
                return False
        return bool(self.state.digests) and self._digest(self.outside) == self.state.digests[0]

    def _digest(self, names: Iterable[str]) -> str:
        """SHA-256 over the values of tensors as they are in the files."""
        wanted, digest = set(names), hashlib.sha256()
        for shard in self.shards:
            digest_ranges(
                digest,
                self.folder / shard.path.name,
                [(e.start, e.stop) for e in shard.entries.values() if e.name in wanted],
            )
        return digest.hexdigest()

    def _note(self, **changes: Any) -> None:
        state = replace(self.state, **changes)
        text = json_text({"unfinished": _ADVICE, "version": VERSION, **asdict(state)})

        def write(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")

        replace_file(self.folder / STATE, write)
        self.state = state


@contextmanager
def unfinished(
    stream: Stream,
    source: Path,
    output: Path,
    identity: Mapping[str, Any],
    plan: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[PartialOutput]:
    """Open, or continue, the directory in the making; what the body of the `with` leaves when it fails can be
    continued. It ends after a block at which `stopping()` is true.

    Raises BillhookError where another run is at work there, or the one to continue was asked for something else;
    Interrupted for a run that was stopped, or that the disk or the memory stopped, after some blocks. Other errors
    would come again: they leave nothing.
    """
    folder = partial_folder(output)
    if rank():
        begun = gather(State({}, {}, len(stream.blocks), [], []))[0]
        for index in range(begun.done):
            stream.moved(index, folder)
        yield PartialOutput(stream, source, output, begun, stopping)
        return
    lock = _lock(folder)
    strange = _foreign_file(folder, source)
    keep = (folder / STATE).exists() or bool(strange)
    made: PartialOutput | None = None
    try:
        if strange:
            raise BillhookError(
                f"{folder}, where {output} would be made, holds {strange}, which no run put there: move the "
                "folder away."
            )
        state = check_place(output, resume=resume, overwrite=overwrite)
        check_output(output, source, overwrite=overwrite)
        if state is None:
            keep = False
            _empty(folder)
            state = State(dict(identity), dict(plan), len(stream.blocks), [], [])
        check_same_run(state.identity, identity, folder)
        made = PartialOutput(stream, source, output, state, stopping)
        made.begin()
        gather(made.state)
        yield made
    except (KeyboardInterrupt, OSError, MemoryError, RuntimeError, Interrupted) as error:
        keep = keep or (made is not None and bool(made.state.done or made.state.files))
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        raise _interrupted(error, source, output, made if keep else None) from None
    except BillhookError:
        keep = keep and made is None
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _interrupted(error: BaseException, source: Path, output: Path, kept: PartialOutput | None) -> BaseException:
    """What to tell about a run that ended early: how to continue it, if anything is left of it."""
    if kept is None and not isinstance(error, OSError):
        return error
    what = "Stopped"
    if isinstance(error, OSError | SafetensorError):
        what = failure(error, output, sum(file.stat().st_size for file in weight_files(source))).rstrip(".")
    elif isinstance(error, MemoryError | RuntimeError):
        what = "Out of memory"
    elif isinstance(error, Interrupted):
        what = str(error).rstrip(".")
    if kept is None:
        return JobError(f"{what}. Nothing was left behind.")
    done = f"{kept.state.done} of {kept.state.blocks} blocks are finished and kept in {kept.folder}"
    return Interrupted(f"{what}. {done}: continue with the same command and --resume.")


def _lock(folder: Path) -> int:
    """Make the folder and lock it for as long as the process lives; raises BillhookError when another process has
    it."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise BillhookError(
                f"{folder}, where the output would be made, is a file: move it away, or choose another output."
            ) from None
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise BillhookError(
                f"Another run is writing {folder} at this moment: wait for it, or choose another output."
            ) from None
        except FileNotFoundError:  # the other run has just finished and given the folder its final name
            pass
        os.close(handle)


def _foreign_file(folder: Path, source: Path) -> str | None:
    """A file in `folder` that no unfinished run of ours can have left, so that nothing of somebody else's is
    deleted."""
    if (folder / STATE).exists():
        return None
    own = {INDEX, *(file.name for file in weight_files(source))}
    return min(
        (path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith(f".{STATE}.")),
        default=None,
    )


def _empty(folder: Path, but: Sequence[str] = ()) -> None:
    for path in folder.iterdir():
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
