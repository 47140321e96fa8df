"""The dense model of a directory: found by the directory's history, and checked to be the one that it came from."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel

from billhook.architectures.config import classes_of, hidden_width, is_headless
from billhook.architectures.sources import resolve
from billhook.engine.streaming import open_streamed
from billhook.errors import BillhookError
from billhook.steps.inputs import ModelRequest
from billhook.steps.request import Opened
from billhook.store.checkpoint import load, load_tokenizer, model_digest, read_config
from billhook.store.record import Record


class Teacher(NamedTuple):
    """The directory of a dense model, and its digest."""

    path: Path
    digest: str


def find_teacher(history: Record | None, source: Path | None, given: str | Path | None, output: Path) -> Teacher | None:
    """The dense model: `given`, or the one with the digest that the first step of the history names, looked for beside
    the directory `source`, in the working directory and in the hub's cache. None without a history.

    Raises BillhookError where it is not found, and where what is `given` is not that model, or a GGUF file that the
    directory `output` would replace.
    """
    if given is None and history is None:
        return None
    wanted = None if history is None else history.steps[0].model.get("digest")
    if given is not None:
        path = resolve(given, output)
        digest = model_digest(path)
        if wanted not in (None, digest):
            raise BillhookError(
                f"{given} is not the model that {source} was made from ({_named(history)}): its digest differs."
            )
        return Teacher(path, digest)
    for path in _candidates(history, source):
        if (path / "config.json").is_file() and model_digest(path) == wanted:
            return Teacher(path, wanted)
    places = "beside it, in the working directory or in the hub's cache"
    raise BillhookError(
        f"The dense model of {source}, {_named(history)}, is not {places}: name it with --teacher DIRECTORY."
    )


def open_teacher(path: Path, opened: Opened, request: ModelRequest, *, streamed: bool = False) -> PreTrainedModel:
    """Load the dense model in the dtype and on the device of the opened one; `streamed`, its blocks are read from disk
    whenever they are called.

    Raises BillhookError where its tokenizer or what it predicts differs.
    """
    read_config(path)
    model, kind = opened.model, opened.task.auto_class
    dtype, device, trust = model.dtype, str(model.device), request.trust_remote_code
    if streamed:
        teacher = open_streamed(path, kind, dtype=dtype, device=device, trust_remote_code=trust).model
    else:
        teacher = load(path, kind, dtype=dtype, device=device, trust_remote_code=trust)
    ours, theirs = (hidden_width(m) if is_headless(m) else classes_of(m) for m in (model, teacher))
    if ours != theirs:
        raise BillhookError(f"{path} cannot teach {request.model}: it predicts {theirs} classes, not {ours}.")
    if opened.source is not None and _vocabulary(opened.source) != _vocabulary(path):
        raise BillhookError(
            f"{path} cannot teach {request.model}: its tokenizer differs. Give both directories the same tokenizer."
        )
    return teacher.requires_grad_(False)


def _named(history: Record | None) -> str:
    model = {} if history is None else history.steps[0].model
    return f"{model.get('name')} with the digest {str(model.get('digest'))[:12]}"


def _candidates(history: Record | None, source: Path | None) -> Iterator[Path]:
    name = str(None if history is None else history.steps[0].model.get("name"))
    if source is not None:
        yield source.resolve().parent / name
    yield Path.cwd() / name
    try:
        yield Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return


def _vocabulary(path: Path) -> dict[str, int]:
    """The ids of all tokens of a directory's tokenizer; empty without one."""
    tokenizer = load_tokenizer(path)
    return {} if tokenizer is None else tokenizer.get_vocab()
