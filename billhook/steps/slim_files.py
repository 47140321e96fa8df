"""The smaller model while it is written: its configuration, its tensors on disk, and the blocks as they are by now.

One safetensors file holds what lies outside the blocks, and one each block that stays. The model that is walked keeps
its shapes; a finished block is read from its file and filled up with zeros where parts were removed, so that what
follows sees exactly what is stored.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.slicing import Cuts, cuts_of, with_zeros, without, zeroed
from billhook.architectures.slim_blocks import reshaped
from billhook.architectures.units import Unit
from billhook.engine.streaming import Stream, stream_of
from billhook.errors import BillhookError
from billhook.steps.block_files import FilePerBlock
from billhook.store.checkpoint import loading
from billhook.store.files import sha256
from billhook.store.fitting import Stored
from billhook.store.locate import to_disk
from billhook.store.shards import Entry, read_shard
from billhook.store.tensor_bytes import as_stored, exact


@dataclass
class Smaller:
    """The smaller model, opened with one block at a time in memory; `stream` reads the blocks that are written.

    `source` is the model that is walked; `blocks` are the numbers in it of the blocks that stay; `counts` parts of each
    unit are stored, by name; `kept` says which parts stayed, bool [parts] by unit. Others that are stored are zeros.
    """

    source: Stream
    stream: Stream
    units: Sequence[Unit]
    counts: Mapping[str, int]
    blocks: Sequence[int]
    kept: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: Path,
        source: Stream,
        config: Any,
        *,
        units: Sequence[Unit],
        counts: Mapping[str, int],
        blocks: Sequence[int],
    ) -> "Smaller":
        """Open the model of a configuration, without values in its blocks.

        Raises BillhookError where the configuration does not give the shapes that are left.
        """
        model = source.model
        first = {unit.name: torch.arange(unit.count) < counts[unit.name] for unit in units}
        cuts = cuts_of(units, first)
        inside = {name for names in source.names for name in names}
        stored = {name: Stored(s.path, s.entry, False) for name, s in source.source.items() if name not in inside}
        for old in blocks:
            shapes = dict[str, Tensor]()
            for name, value in source.state(old).items():
                empty = torch.empty(value.shape, dtype=torch.uint8)  # its values do not matter
                shapes[name] = without(name, empty, cuts).to("meta")
            renamed = {_renamed(name, source, old, blocks): value for name, value in shapes.items()}
            before, after = (to_disk(model, state, source.source) for state in (shapes, renamed))
            for was, (name, value) in zip(before, after.items(), strict=True):
                like = source.source.get(was) or next(iter(source.source.values()))
                stored[name] = Stored(path, Entry(name, like.entry.dtype, tuple(value.shape), 0, 0), True)
        kind = type(model)
        if config.model_type != model.config.model_type:
            import transformers

            kind = getattr(transformers, config.architectures[0])
        try:
            with loading(path):
                stream = stream_of(path, kind, config, stored, dtype=model.dtype, device=str(model.device))
                return cls(source, stream, units, counts, blocks)
        except BillhookError:
            fewer = [unit.kind for unit in units if counts[unit.name] < unit.count]
            fewer += ["blocks"] if len(blocks) < len(source.blocks) else []
            kinds = " and ".join(dict.fromkeys(fewer))
            kept = [(b, name, x) for b in blocks for name, x in source.state(b).items() if name not in cuts]
            whole = {_renamed(name, source, b, blocks): x.shape for b, name, x in kept}
            reason = _reshaped(model, config, whole)
            who = f"{model.config.model_type} models cannot have fewer {kinds}"
            raise BillhookError(f"{who}: {reason}.") from None

    def cuts(self, block: int) -> Cuts:
        """What goes from each tensor of a block of the source."""
        units = [unit for unit in self.units if unit.block == block]
        stored = {unit.name: _filled(self.kept[unit.name], self.counts[unit.name]) for unit in units}
        return cuts_of(units, stored)

    def small(self, block: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block on disk, in the dtypes there, from those in memory."""
        left = self._left(block, state)
        dtypes = {name: self.stream.source[name].dtype for name in left}
        rounded = any(not exact(dtypes[name], value.dtype) for name, value in left.items())
        source = self._left(block, self.source.of_files(block)) if rounded else left
        return {
            name: as_stored(name, value, dtypes[name], partial(source.__getitem__, name))
            for name, value in left.items()
        }

    def _left(self, block: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stays of the tensors of a block in memory, by the names on disk, with zeros in what does not stay."""
        cuts = self.cuts(block)
        gone = cuts_of([unit for unit in self.units if unit.block == block], self.kept)
        left = {}
        for name, value in state.items():
            left[_renamed(name, self.source, block, self.blocks)] = without(name, zeroed(name, value, gone), cuts)
        return to_disk(self.source.model, left, self.stream.source)

    def state(self, block: int) -> dict[str, Tensor]:
        """The tensors in memory of a finished block of the source, with zeros where parts were removed."""
        new, shapes = self.blocks.index(block), {name: v.shape for name, v in self.source.state(block).items()}
        cuts = self.cuts(block)
        with self.stream.block(new):
            values = self.stream.state(new)
            return {
                name: with_zeros(name, values[_renamed(name, self.source, block, self.blocks)], shape, cuts)
                for name, shape in shapes.items()
            }


def _reshaped(model: PreTrainedModel, config: Any, whole: Mapping[str, torch.Size]) -> str:
    """Which weight outside of the blocks, or of those inside that stay `whole`, would have another shape by a
    configuration, and what to do."""
    advice, same = "name other kinds of units", "size from the same entry of their configuration"
    try:
        with torch.device("meta"):
            made = type(model)(config)
    except Exception:  # whatever the class raises for numbers that do not fit together
        return f"their configuration does not give the shapes that are left; {advice}"
    if (name := reshaped(model, made)) is not None:
        return f"{name}, which is outside of the blocks, has its {same}; other stacks can be chosen with --stacks"
    shapes = {name: value.shape for name, value in made.state_dict().items()}
    for name, shape in whole.items():
        if shapes.get(name, shape) != shape:
            return f"{name}, of which nothing goes, has its {same}; {advice}"
    return f"their configuration does not give the shapes that are left; {advice}"


def _filled(kept: Tensor, count: int) -> Tensor:
    """The parts that are stored, bool [parts]: those `kept`, and the first others up to `count`."""
    stored = kept.clone()
    stored[(~kept).nonzero()[: count - int(kept.sum()), 0]] = True
    return stored


def _renamed(name: str, source: Stream, old: int, blocks: Sequence[int]) -> str:
    """The full name in memory of a tensor of block `old` in the smaller model, in which these `blocks` stay."""
    stacks = [prefix.rpartition(".")[0] for prefix in source.prefixes]
    number = sum(block < old and stacks[block] == stacks[old] for block in blocks)
    return f"{stacks[old]}.{number}{name.removeprefix(source.prefixes[old])}"


class SmallerFiles(FilePerBlock):
    """The sink of a smaller model, with one file for each block that stays."""

    same_values = False  # as in memory: the files may have another dtype

    def __init__(self, smaller: Smaller) -> None:
        super().__init__(smaller.source, len(smaller.blocks))
        self.smaller = smaller

    def begin(self, folder: Path, copied: Collection[str]) -> None:
        """Write the file of the tensors outside of the blocks."""
        tensors = {n: Stored(self.entries[n].path, self.entries[n].entry, lazy=False).read() for n in copied}
        self._save(folder / self.files[0], tensors)

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the file of a block that stays, given its tensors in memory by name."""
        if (index := self._number(state)) in self.smaller.blocks:
            self._save(folder / self._file(index), self.smaller.small(index, state))

    def digest(self, folder: Path, names: Iterable[str]) -> str:
        """The SHA-256 of the file of these tensors: those of one block, or those outside of the blocks."""
        index = min((self._block.get(name, -1) for name in names), default=-1)
        if index >= 0 and index not in self.smaller.blocks:
            return ""
        path = folder / (self.files[0] if index < 0 else self._file(index))
        return sha256(path) if path.is_file() else "missing"

    def moved(self, folder: Path, index: int) -> None:
        """From now on read a finished block from its file."""
        smaller = self.smaller
        if index in smaller.blocks:
            shard = read_shard(folder / self._file(index))
            smaller.stream.stored |= {name: Stored(shard.path, e, lazy=True) for name, e in shard.entries.items()}
            smaller.source.replaced[index] = lambda: smaller.state(index)

    def _file(self, index: int) -> str:
        return self.files[self.smaller.blocks.index(index) + 1]
