"""Open a model directory with one block at a time in memory.

Everything outside the blocks (embeddings, final norm, head) is loaded as usual. The parameters of the blocks stay on
torch's meta device, which has shapes and no values. `Stream.block(index)` loads those of one block, by the same
conversion with which `transformers` loads a whole model (it may rename, split, fuse or transpose tensors), and drops
them afterwards. A block that is called while it is not in memory is loaded for that call, so that a streamed model can
do whatever any other model can, only more slowly.

Values are read, not memory-mapped: a truncated file or a failing disk is then an error and not a signal, memory use is
what is counted, and any kind of memory limit works. While a GPU computes, the next block is read in the background.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
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
from billhook.architectures.stacks import blocks_of
from billhook.errors import BillhookError, Interrupted, JobError
from billhook.store.checkpoint import check_code, from_pretrained, loading, on_device, quiet, resolve
from billhook.store.shards import Entry, Shard, read_shard
from billhook.store.tensor_bytes import DTYPES, tensor_bytes


class Stored:
    """A tensor in a file, given to `transformers` in place of the tensor itself: it asks for all of it, and for a
    device and a dtype."""

    def __init__(self, path: Path, entry: Entry, elsewhere: bool) -> None:
        if entry.dtype not in DTYPES:
            raise BillhookError(
                f"{path}: {entry.name} is {entry.dtype}, a type that cannot be computed with. Convert the model first."
            )
        self.path, self.entry, self.elsewhere = path, entry, elsewhere
        self.dtype = DTYPES[entry.dtype]

    def is_floating_point(self) -> bool:
        """Whether it is of a floating-point type."""
        return self.dtype.is_floating_point

    def __getitem__(self, everything: Any) -> "Tensor | Stored":
        return self if self.elsewhere else self.read()

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its shape without values."""
        return torch.empty(self.entry.shape, dtype=dtype or self.dtype, device="meta")

    def read(self) -> Tensor:
        """The values, in the type they have on disk; raises Interrupted when they cannot be read."""
        value = torch.empty(self.entry.shape, dtype=self.dtype)
        data = tensor_bytes(value)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.entry.start)
                while data and (count := file.readinto(data)):
                    data = data[count:]
        except OSError as error:
            raise Interrupted(f"Cannot read the weights {self.path}: {error.strerror or error}.") from None
        if data:
            raise Interrupted(f"{self.path} was cut off while it was being read: {self.entry.name} is incomplete.")
        return value


class Stream:
    """Loads the blocks of a model one at a time, from the files that hold them now."""

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
        self.model, self.stored, self.source = model, dict(stored), dict(stored)
        blocks = blocks_of(model)
        self.prefixes, self.blocks = list(blocks), list(blocks.values())
        self.names: list[list[str]] = [[] for _ in self.blocks]  # of the tensors on disk
        for name, index in block_of(model, stored).items():
            if index is not None:
                self.names[index].append(name)
        self._elsewhere = [list(_meta(block)) for block in self.blocks]
        self._here: set[int] = set()
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    @contextmanager
    def block(self, index: int, ahead: int | None = None, source: bool = False) -> Iterator[None]:
        """Keep a block in memory; see `billhook.engine.resources.Resources.block`."""
        if index in self._here:
            yield
            return
        self._here.add(index)
        try:
            self.load(index, self.source if source else self.stored)
            on_device = self.model.device.type != "cpu"  # on a CPU, reading takes no time beside computing, only memory
            if on_device and ahead is not None and 0 <= ahead < len(self.blocks) and ahead not in self._ahead:
                self._ahead[ahead] = self._reader.submit(self._read, ahead, self.stored)
            yield
        finally:
            self._here.discard(index)
            for module, name, value in self._elsewhere[index]:
                setattr(module, name, value)

    def load(self, index: int, stored: Mapping[str, Stored]) -> None:
        """Bring the parameters of a block into memory (again); raises JobError when the files do not give all of
        them."""
        waiting = self._ahead.pop(index, None) if stored is self.stored else None
        tensors = self._read(index, stored) if waiting is None else waiting.result()
        for module, name, value in self._elsewhere[index]:
            setattr(module, name, value)
        known: Any = self.model._weight_conversions
        options = LoadStateDictConfig(
            dtype=self.model.dtype, weight_mapping=known, device_map={"": str(self.model.device)}
        )
        with quiet():
            convert_and_load_state_dict_in_model(self.model, tensors, options)
        if any(value.is_meta for value in self.blocks[index].state_dict(keep_vars=True).values()):
            raise JobError(
                f"The weights of {self.prefixes[index]} cannot be read one block at a time: are they shared "
                "between blocks?"
            )

    def moved(self, index: int, folder: Path) -> None:
        """From now on read a block from the files of the same names in `folder`."""
        for name in self.names[index]:
            old = self.stored[name]
            self.stored[name] = Stored(folder / old.path.name, old.entry, elsewhere=True)

    def state(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block by their full names in the model."""
        return {f"{self.prefixes[index]}.{name}": value for name, value in self.blocks[index].state_dict().items()}

    def _read(self, index: int, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
        return {name: stored[name].read() for name in self.names[index]}


def _meta(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The tensors of a block that have no values yet."""
    for module in block.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_meta:
                yield module, name, value


def block_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, int | None]:
    """The index of the block that each tensor on disk belongs to, None outside the blocks; `model` may be on the meta
    device."""
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
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Stream:
    """`billhook.store.checkpoint.load_model` with one block at a time in memory: the same model (`Stream.model`), the
    same errors."""
    path = resolve(path)
    checkpoint = check_code(path, auto_class, trust_remote_code)
    shards = [read_shard(file) for file in checkpoint.weights]
    with loading(path):
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            empty = getattr(transformers, auto_class).from_config(config, trust_remote_code=trust_remote_code)
        outside = {name for name, block in block_of(empty, stored_tensors(shards)).items() if block is None}
        if type(config) is not type(empty.config):
            config = text_config(config)
        stored = stored_tensors(shards, outside.__contains__)
        model = from_pretrained(type(empty), path, None, dtype=dtype, config=config, state_dict=stored)
    model.config.name_or_path = str(path)
    with on_device(device):
        model.eval()._apply(lambda value: value if value.is_meta else value.to(device))
    stream = Stream(model, stored)
    for index, block in enumerate(stream.blocks):
        block.forward = _loading_forward(stream, index, block.forward)
    return stream


def _loading_forward(stream: Stream, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward that loads the block for the call, unless it is in memory already."""

    def loaded(*args: Any, **kwargs: Any) -> Any:
        with stream.block(index):
            return forward(*args, **kwargs)

    return loaded


def stored_tensors(shards: Sequence[Shard], outside: Callable[[str], bool] = lambda name: False) -> dict[str, Stored]:
    """The tensors of files by name; those for which `outside` is true are read as soon as they are asked for."""
    return {
        name: Stored(shard.path, entry, not outside(name)) for shard in shards for name, entry in shard.entries.items()
    }
