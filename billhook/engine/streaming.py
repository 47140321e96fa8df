"""Open a model directory with one block at a time in memory.

Everything outside the blocks (embeddings, final norm, head) is loaded as usual. The parameters of the blocks stay on
torch's meta device, without values. `Stream.block(index)` loads those of one block, with the conversion by which
`transformers` loads a whole model (tensors are renamed, split, fused or transposed), and drops them afterwards. A block
that is called while it is not in memory is loaded for that call, so that a streamed model works like any other, only
more slowly.

Values are read and not memory-mapped: a truncated file or a failing disk is then an error and not a signal, and memory
limits count what is used. While a GPU computes, the next block is read in the background.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

from billhook.architectures.config import text_config
from billhook.architectures.selection import reach
from billhook.architectures.sources import resolve
from billhook.architectures.stacks import add_stacks, added_stacks, blocks_of
from billhook.errors import JobError
from billhook.store.checkpoint import (
    check_directory,
    check_trusted,
    from_pretrained,
    loading,
    on_device,
    quiet,
)
from billhook.store.compute import chosen_device, chosen_dtype
from billhook.store.fitting import Stored, check_fits, empty_model, stored_tensors
from billhook.store.shards import read_shard, weight_files


class Stream:
    """Loads the blocks of a model one at a time, from the files that currently hold them."""

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
        self.model, self.stored, self.source = model, dict(stored), dict(stored)
        self.replaced: dict[int, Callable[[], Mapping[str, Tensor]]] = {}  # blocks that have other values by now
        blocks = blocks_of(model)
        self.prefixes, self.blocks = list(blocks), list(blocks.values())
        self.names: list[list[str]] = [[] for _ in self.blocks]  # names of the tensors on disk
        for name, index in block_of(model, stored).items():
            if index is not None:
                self.names[index].append(name)
        self._meta = [list(_meta_tensors(block)) for block in self.blocks]
        self._loaded: set[int] = set()
        self.of_source = False  # whether the block in memory has its original weights
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    @contextmanager
    def block(self, index: int, ahead: int | None = None, source: bool = False) -> Iterator[None]:
        """Keep a block in memory; see `billhook.engine.resources.Resources.block`."""
        if index in self._loaded:
            yield
            return
        self._loaded.add(index)
        self.of_source = source
        try:
            self.load(index, self.source if source else self.stored)
            on_gpu = self.model.device.type != "cpu"  # on a CPU, reading ahead costs memory and saves no time
            if on_gpu and ahead is not None and 0 <= ahead < len(self.blocks) and ahead not in self._ahead:
                self._ahead[ahead] = self._reader.submit(self._read, ahead, self.stored)
            yield
        finally:
            self._loaded.discard(index)
            self.of_source = False
            self._drop(index)

    def load(self, index: int, stored: Mapping[str, Stored]) -> None:
        """Load the parameters of a block (again); raises JobError when some are not in the files."""
        if stored is self.stored and index in self.replaced:
            values = dict(self.replaced[index]())
            self._drop(index)
            for name, value in values.items():
                put_tensor(self.model, name, value)
            return
        waiting = self._ahead.pop(index, None) if stored is self.stored else None
        tensors = self._read(index, stored) if waiting is None else waiting.result()
        self._drop(index)
        self._convert(index, tensors, self.model.dtype, str(self.model.device))

    def of_files(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block of the source by their full names in the model, on the CPU, in a dtype that holds
        every value in the files; the block in memory stays as it is."""
        tensors, now = self._read(index, self.source), self.state(index)
        floating = [value.dtype for value in tensors.values() if value.is_floating_point()]
        dtype = functools.reduce(torch.promote_types, floating, self.model.dtype)
        self._drop(index)
        for name, value in self.state(index).items():
            if value.is_meta and value.is_floating_point():  # values are loaded in the dtype of what they replace
                put_tensor(self.model, name, value.to(dtype))
        self._convert(index, tensors, dtype, "cpu")
        values = self.state(index)
        for name, value in now.items():
            put_tensor(self.model, name, value)
        return values

    def _convert(self, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> None:
        known: Any = self.model._weight_conversions
        options = LoadStateDictConfig(dtype=dtype, weight_mapping=known, device_map={"": device})
        with quiet():
            convert_and_load_state_dict_in_model(self.model, dict(tensors), options)
        if any(value.is_meta for value in self.blocks[index].state_dict(keep_vars=True).values()):
            weights = f"The weights of {self.prefixes[index]}"
            raise JobError(f"{weights} cannot be read one block at a time: are they shared between blocks?")

    def _drop(self, index: int) -> None:
        for module, name, value in self._meta[index]:
            setattr(module, name, value)

    def moved(self, index: int, folder: Path) -> None:
        """From now on read a block from the files of the same names in `folder`."""
        for name in self.names[index]:
            old = self.stored[name]
            self.stored[name] = Stored(folder / old.path.name, old.entry, lazy=True)

    def state(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block by their full names in the model."""
        return {f"{self.prefixes[index]}.{name}": value for name, value in self.blocks[index].state_dict().items()}

    def _read(self, index: int, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
        return {name: stored[name].read() for name in self.names[index]}


def put_tensor(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """Give a parameter or buffer of a model, by its full name, other values, of any shape."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, last, nn.Parameter(value, requires_grad=False) if last in module._parameters else value)


def _meta_tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The tensors of a block that have no values."""
    for module in block.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_meta:
                yield module, name, value


def block_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, int | None]:
    """The index of the block of each tensor on disk, None outside the blocks; `model` may be on the meta device."""
    prefixes = {f"{name}.": index for index, name in enumerate(blocks_of(model))}
    transforms = get_model_conversion_mapping(model)
    renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
    converters = [x for x in transforms if isinstance(x, WeightConverter)]
    state = model.state_dict()

    def owner(name: str) -> int | None:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], model.base_model_prefix, state)
        inside = (index for prefix, index in prefixes.items() if target.startswith(prefix))
        return next(inside, None) if target in state else None

    return {name: owner(name) for name in names}


def open_streamed(
    path: str | Path,
    auto_class: str = "AutoModelForCausalLM",
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    targets: Sequence[str] = (),
) -> Stream:
    """Like `billhook.store.checkpoint.load`, with one block at a time in memory; the model is `Stream.model`.

    What `targets` mean outside of the blocks are blocks too (`billhook.architectures.selection.reach`).
    """
    path = resolve(path)
    check_trusted(path, check_directory(path), auto_class, trust_remote_code)
    device = chosen_device(device)
    dtype = chosen_dtype(dtype, device, path)
    shards = [read_shard(file) for file in weight_files(path)]
    with loading(path):
        config, empty = empty_model(path, shards, auto_class, trust_remote_code)
        check_fits(path, empty, shards)
        reach(empty, targets)
        outside = {name for name, block in block_of(empty, stored_tensors(shards)).items() if block is None}
        if type(config) is not type(empty.config):
            config = text_config(config)
        stored = stored_tensors(shards, outside)
        return stream_of(path, type(empty), config, stored, dtype=dtype, device=device, added=added_stacks(empty))


def stream_of(
    path: Path,
    kind: type[PreTrainedModel],
    config: Any,
    stored: Mapping[str, Stored],
    *,
    dtype: torch.dtype,
    device: str,
    added: Sequence[str] = (),
) -> Stream:
    """Open a model of class `kind` whose tensors on disk are `stored`, those of its blocks lazy; modules outside of
    them that are `added` are blocks too.

    Raises BillhookError, naming `path`, where they do not fit the configuration.
    """
    model = from_pretrained(kind, path, None, dtype=dtype, config=config, state_dict=dict(stored))
    model.config.name_or_path = str(path)
    add_stacks(model, added)
    with on_device(device):
        model.eval()._apply(lambda value: value if value.is_meta else value.to(device))
    stream = Stream(model, stored)
    for index, block in enumerate(stream.blocks):
        block.forward = _loading_forward(stream, index, block.forward)
    return stream


def _loading_forward(stream: Stream, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward that loads the block for the call if it is not in memory."""

    @functools.wraps(forward)
    def loaded(*args: Any, **kwargs: Any) -> Any:
        with stream.block(index):
            return forward(*args, **kwargs)

    return loaded
