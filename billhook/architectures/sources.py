"""Where a model comes from: a directory, a name on the hub, or a GGUF file, which is made into a directory.

The directory of a GGUF file is kept in the user's cache folder (`BILLHOOK_CACHE`) under the SHA-256 of the file, so
that it is made once. It may be deleted at any time.
"""

import functools
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from billhook.architectures.gguf_reading import hf_config, write_weights
from billhook.errors import BillhookError
from billhook.store import checkpoint
from billhook.store.checkpoint import class_names, loading, quiet
from billhook.store.files import cache_folder, digest_of, json_text, sha256, untrusted
from billhook.store.gguf_file import GgufFile, gguf_inside, read_gguf
from billhook.store.locate import to_disk
from billhook.store.output import check_output, staging
from billhook.store.shards import SINGLE, weight_files

_VERSION = 1  # of what a file is converted to


def resolve(model: str | Path, output: Path | None = None) -> Path:
    """The directory of `model`: an existing directory, the cached one of a GGUF file (or of a directory whose only
    weights are one), or the hub's cache, to which a hub name (`owner/name`) is downloaded.

    Raises BillhookError where there is no such model, for a GGUF file that is damaged or of an unknown kind, and for
    one that the directory `output` would replace.
    """
    path = Path(model).expanduser()
    if path.is_dir() and (inside := gguf_inside(path)) is not None and not weight_files(path):
        path = inside
    if path.suffix != ".gguf" or path.is_dir():
        return checkpoint.resolve(model)
    if output is not None:
        check_output(output, path, overwrite=True)
    file = read_gguf(path)
    _note_rounded(path.absolute(), str(path))
    folder = cache_folder()
    if folder is None:
        raise BillhookError(f"{path} must be made into a directory: let BILLHOOK_CACHE name a folder for it.")
    digest = sha256(path) if len(file.parts) == 1 else digest_of({part.name: sha256(part) for part in file.parts})
    directory = folder / "gguf" / f"{_VERSION}-{digest[:32]}" / file.path.name
    if not (directory / "config.json").is_file():
        convert(file, directory)
    return directory


def is_gguf(model: str | Path) -> bool:
    """Whether a model is a GGUF file, or a directory whose only weights are one."""
    path = Path(model).expanduser()
    return path.suffix == ".gguf" or (path.is_dir() and gguf_inside(path) is not None and not weight_files(path))


def convert(file: GgufFile, directory: Path) -> None:
    """Write the new model directory of a GGUF file; atomic. Raises BillhookError for a model of an unknown kind, or a
    directory that is not empty, and JobError for a full disk."""
    with loading(file.path):
        config = hf_config(file)
        full = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(full)
        shapes = {name: tuple(tensor.shape) for name, tensor in to_disk(model, model.state_dict(), ()).items()}
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight", None)
    needed = sum(4 * math.prod(entry.shape) for entry in file.tensors.values())
    directory.parent.mkdir(parents=True, exist_ok=True)
    check_output(directory, needed=needed)
    with staging(directory, needed) as folder:
        with untrusted(f"The metadata of {file.path} does not fit its tensors", "Download it again."):
            write_weights(file, config, shapes, folder / SINGLE)
        _write_tokenizer(file, folder)
        own: dict[str, Any] = {"architectures": list(class_names("AutoModelForCausalLM")[config["model_type"]])[:1]}
        (folder / "config.json").write_text(json_text({**full.to_diff_dict(), **own}, own=False), encoding="utf-8")


def _write_tokenizer(file: GgufFile, folder: Path) -> None:
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind is None or kind.value == "none":
        return
    try:
        with quiet():
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        _note(f"the tokenizer of {file.path} cannot be read and is left out ({str(error)[:200]!r}).")


@functools.cache
def _note_rounded(file: Path, name: str) -> None:
    """Print once for each file, which several parts of a command resolve, that its weights are rounded."""
    _note(f"{name} holds rounded weights: results are those of the file, not of its original.")


def _note(text: str) -> None:
    print(f"billhook: note: {text}", file=sys.stderr)
