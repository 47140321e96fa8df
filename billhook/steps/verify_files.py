"""Check the files of a directory against the checksums in its billhook.json, and that its configuration loads."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from billhook.errors import BillhookError
from billhook.store.files import sha256
from billhook.store.layout import RECORD
from billhook.store.shards import Shard

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def check_files(directory: Path, files: Mapping[str, str], known: Mapping[str, str] | None = None) -> Iterator[str]:
    """Compare the SHA-256 of files, some of which are `known`."""
    found = dict(known or {})
    for name, digest in files.items():
        if name not in found and not (directory / name).is_file():
            yield f"{name} is {'a directory, not a file' if (directory / name).is_dir() else 'missing'}."
        elif (found.get(name) or sha256(directory / name)) != digest:
            yield f"{name} is not the file that was written: its SHA-256 differs."


def unlisted_weights(directory: Path, files: Mapping[str, str]) -> Iterator[str]:
    """The weight files of a directory that are not among `files`."""
    others = (".gguf",) if any(name.endswith(".gguf") for name in files) else ()  # beside safetensors it may be
    for path in sorted(directory.iterdir()):
        # transformers would read a model.safetensors that was added, and ignore the shards
        if path.suffix in (*_WEIGHTS, *others) and path.name not in files:
            yield f"{path.name} holds weights and is not listed in {RECORD}."


def check_config(directory: Path, shards: Sequence[Shard]) -> Iterator[str]:
    """Whether the configuration loads, and fits the number of tensors."""
    from billhook.store.checkpoint import check_loads

    try:
        check_loads(directory, sum(len(shard.entries) for shard in shards))
    except BillhookError as error:
        yield f"config.json cannot be loaded: {error}"
