"""The directory that is trained: dense as it is, or one that is packed or quantized, which is expanded for the time of
the run into a folder beside the output."""

import os
import shutil
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from billhook.architectures.sources import resolve
from billhook.distributed.torchrun import rank
from billhook.errors import BillhookError, JobError
from billhook.export import compressed_tensors
from billhook.export.dense import dense_bytes, packed_grids
from billhook.methods.quantize.scalar import Scalar
from billhook.recovery.trained import Kept, Scaled, Trained
from billhook.reports.publishing import publish
from billhook.reports.quantized_card import publish_quantized
from billhook.reports.slim_card import publish_slim
from billhook.steps.export import write_decoded
from billhook.steps.pack import unpack
from billhook.steps.request import Opened
from billhook.steps.unfinished_folder import empty_folder, lock_folder
from billhook.store.checkpoint import check_directory
from billhook.store.fitting import Stored
from billhook.store.layout import is_packed
from billhook.store.locate import to_disk
from billhook.store.output import check_apart, failure
from billhook.store.record import Record
from billhook.store.shards import copy_index, read_shard, weight_files, weights_index
from billhook.store.sinks import choose_sink


class Place:
    """A locked folder beside an output, deleted when it is closed or the process ends. What is in it after `kill -9` is
    deleted by the next run with this output and as many processes."""

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f".{output.name}.billhook-expanded-{rank()}")
        lock = lock_folder(self.folder)
        self.close = weakref.finalize(self, _delete, self.folder, lock)
        empty_folder(self.folder)


def _delete(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


@dataclass(frozen=True)
class Source:
    """`given` is the directory of the request, and `dense` the one that is opened; of a quantized one, `grids` are the
    types of its weights by name. `place` is the folder in which `dense` is, until it is closed."""

    given: Path
    dense: Path
    grids: Mapping[str, Scalar]
    place: Place | None = None

    @classmethod
    def of(cls, model: str | Path, output: Path) -> "Source":
        """Expand a packed or quantized model; raises BillhookError for a format that is not read, and for a model that
        the directory `output` would replace."""
        if not isinstance(model, str | Path):
            raise BillhookError(f"recover works on a directory, got {type(model).__name__}: save the model first.")
        path = resolve(model, output)
        check_apart(output, path)  # not only the folder into which it is expanded
        config = {} if is_packed(path) else check_directory(path, quantized=True)
        grids = packed_grids(path, config) if config else {}
        if not grids and not is_packed(path):
            return cls(path, path, {})
        if not output.parent.is_dir():
            raise BillhookError(f"Cannot write {output}: the folder {output.parent} does not exist. Create it first.")
        try:
            place = Place(output)
            with ExitStack() as unless_expanded:
                unless_expanded.callback(place.close)
                dense = place.folder / path.name
                if grids:
                    dense.mkdir()
                    write_decoded(path, dense, config, grids, torch.float32, lambda tensor: None)
                else:
                    unpack(path, dense)
                unless_expanded.pop_all()
        except (OSError, SafetensorError) as error:
            raise JobError(f"{failure(error, output, 2 * dense_bytes(path, grids))} Nothing was left behind.") from None
        return cls(path, dense, grids, place)

    @property
    def written_like(self) -> Path:
        """The directory whose files the output has."""
        return self.given if self.grids else self.dense

    def close(self) -> None:
        """Delete what was expanded."""
        if self.place is not None:
            self.place.close()

    def scales(self, opened: Opened, names: Collection[str]) -> list[Trained]:
        """The scales of the quantized weights with these `names`; raises BillhookError for a weight that is not a
        parameter of the model."""
        shards = [read_shard(file) for file in weight_files(self.given)]
        parameters = dict(opened.model.named_parameters())
        found: list[Trained] = []
        for name, grid in self.grids.items():
            if name not in parameters:
                raise BillhookError(
                    f"{self.given}: {name} is no parameter of the model, so its scales cannot be trained."
                )
            if name in names:
                found.append(Scaled(name, parameters[name], compressed_tensors.read(name, grid, shards)))
        return found

    def write(self, model: PreTrainedModel, kept: Sequence[Trained], folder: Path) -> None:
        """Write the weight files of the trained model."""
        if not self.grids:
            choose_sink(model, self.dense)[0].write_all(folder)
            return
        shards = [read_shard(file) for file in weight_files(self.given)]
        entries = {name for shard in shards for name in shard.entries}
        changed: dict[str, Any] = {
            compressed_tensors.names(k.name)[1]: k.weight.scales.parts["scale"].cpu()
            for k in kept
            if isinstance(k, Scaled)
        }
        changed |= to_disk(model, {k.name: k.parameter.detach().cpu() for k in kept if isinstance(k, Kept)}, entries)
        for shard in shards:
            tensors = {}
            for name, entry in shard.entries.items():
                value = Stored(shard.path, entry, lazy=False).read()
                tensors[name] = changed[name].to(value.dtype).contiguous() if name in changed else value
            save_file(tensors, folder / shard.path.name, metadata={"format": "pt"})
        if index := weights_index(self.given):
            size = sum(entry.stop - entry.start for shard in shards for entry in shard.entries.values())
            copy_index(index, folder, size)


def card(history: Record | None) -> Callable[[Path], object]:
    """What writes the report or the card of the output, which are those of the step that made the model smaller."""
    steps = [] if history is None else [step.step for step in history.steps if step.step != "recover"]
    if "quantize" in steps:
        return publish_quantized
    known: dict[str, Callable[[Path], object]] = {"slim": publish_slim, "prune": publish}
    return known.get(steps[-1] if steps else "", lambda folder: None)
