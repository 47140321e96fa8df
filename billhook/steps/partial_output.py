"""An output directory while it is being written: OUTPUT.partial, renamed to OUTPUT when it is complete.

The weight files are created at the start, with everything outside the blocks. Each finished block is written to its
place and flushed to the disk, and only then recorded in `billhook.unfinished.json`, which is replaced atomically. A run
that ends at any moment, for any reason, can thus be resumed after the last recorded block. config.json is written after
the last block, so no program mistakes such a directory for a model. A run holds a lock on the directory, which the
system releases when the process ends.

Only a run with the same `identity` can be resumed. The bytes of every block are checked then; pruning starts again at
the first block whose bytes have changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.distributed.collectives import any_rank, barrier, gather
from billhook.distributed.torchrun import rank
from billhook.engine.loop import LayerResult
from billhook.engine.streaming import Stream
from billhook.engine.walk import Block
from billhook.reports.publishing import publish
from billhook.steps.state import STATE, State, partial_folder, write_state
from billhook.steps.unfinished_folder import empty_folder, unfinished_folder
from billhook.store.directory import complete
from billhook.store.files import sha256
from billhook.store.layout import GRADIENTS, WRITTEN
from billhook.store.output import flush, put_in_place
from billhook.store.shards import weight_bytes, weight_files, weights_entry
from billhook.store.sinks import BlockSink, SameLayout


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

    @property
    def worth_keeping(self) -> bool:
        """Whether blocks, or files that they depend on, are finished."""
        return bool(self.state.done or self.state.files)

    @property
    def reached(self) -> str:
        """How many blocks are finished."""
        return f"{self.state.done} of {self.state.blocks} blocks are finished and"

    def _same_dtypes(self) -> bool:
        """Whether the files have the dtypes of the model in memory."""
        assert isinstance(self.sink, SameLayout)
        tensors = (item for i in range(self.state.blocks) for item in self.sink.on_disk(self.stream.state(i)).items())
        return all(value.dtype == self.stream.stored[name].dtype for name, value in tensors)

    def moved(self, index: int) -> None:
        """From now on read a block from the output."""
        if isinstance(self.sink, SameLayout):
            self.stream.moved(index, self.folder)
        else:
            self.sink.moved(self.folder, index)

    def begin(self) -> None:
        """Create the files, or check those of the run that is resumed."""
        done = self.state.done if self._begun() else None
        if done is not None:
            empty_folder(self.folder, [*self.sink.files, STATE, *self.state.files])
        else:
            self.sink.begin(self.folder, self.outside)
        digests = [self.sink.digest(self.folder, self.outside)]
        for index in range(done or 0):
            digests.append(self.sink.digest(self.folder, self.stream.names[index]))
            if digests[-1] != self.state.digests[len(digests) - 1]:
                digests.pop()
                break
            self.moved(index)
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
        self.moved(block.index)
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
        write_state(self.folder, state)
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
    if rank():
        begun = gather(State({}, {}, len(stream.blocks), [], []))[0]
        partial = PartialOutput(stream, source, output, begun, stopping=stopping, files=files)
        for index in range(begun.done):
            partial.moved(index)
        yield partial
        return
    entries = (*weight_files(source), weights_entry(source))
    written = [file.name for file in entries if file] if files is None else files.files
    with unfinished_folder(output, written, room or weight_bytes(source)) as unfinished:
        new = State(dict(identity), dict(plan), len(stream.blocks), [], [])
        state = unfinished.start(new, source, resume=resume, overwrite=overwrite)
        partial = PartialOutput(stream, source, output, state, stopping=stopping, files=files)
        unfinished.run = partial
        partial.begin()
        gather(partial.state)
        yield partial
