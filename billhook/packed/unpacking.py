"""From a packed directory back to the dense one, byte for byte."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from billhook.errors import BillhookError
from billhook.packed.format import Packed, PackedShard, open_packed
from billhook.packed.matrices import dense_bytes
from billhook.reports.publishing import publish
from billhook.store.files import copy_files
from billhook.store.layout import PACKED, RECORD, REPORT, is_packed
from billhook.store.output import check_output, staging
from billhook.store.shards import INDEX


def unpack(
    directory: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda tensor: None,
) -> Path:
    """Write the dense model that a packed `directory` stands for, and return its path; `progress` is told each finished
    file.

    The files are those that were packed, byte for byte; int8 values are multiplied out and rounded to the model's
    dtype. Raises BillhookError, and leaves nothing, where anything in the directory is not as it was packed.
    """
    directory = Path(directory).expanduser()
    if not is_packed(directory):
        raise BillhookError(
            f"{directory} is not a packed model: it has no {PACKED}. Give a directory that billhook pack wrote."
        )
    packed = open_packed(directory)
    for problem in (*packed.checked_files(), *packed.checked_tensors()):
        raise BillhookError(f"{directory}: {problem}")
    needed = sum(
        len(shard.header) + max((entry.stop for entry in shard.entries.values()), default=0) for shard in packed.shards
    )
    output = check_output(Path(output), directory, overwrite=overwrite, needed=needed)
    with staging(output, needed) as folder:
        for shard in packed.shards:
            if _write(packed, shard, folder / shard.name) != shard.sha256:
                raise BillhookError(
                    f"{directory}: unpacking {shard.name} does not give the file that was packed. Pack the model again."
                )
            progress(shard.name)
        if packed.record["index"] is not None:
            (folder / INDEX).write_text(packed.record["index"], encoding="utf-8", newline="")
        packed_files = {PACKED, *(shard.file.path.name for shard in packed.shards)}
        copy_files(directory, folder, lambda path: path.as_posix() not in packed_files)
        if (folder / RECORD).is_file() and (folder / REPORT).is_file():
            publish(folder)
    return output


def _write(packed: Packed, shard: PackedShard, target: Path) -> str:
    digest = hashlib.sha256()
    with open(target, "wb") as file:
        for piece in dense_bytes(packed, shard):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
