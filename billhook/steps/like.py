"""The storage types of another GGUF file, tensor by tensor (`billhook compress --allocator like:FILE.gguf`)."""

from collections.abc import Mapping
from pathlib import Path

from billhook.architectures.gguf_names import gguf_family, gguf_tensors
from billhook.errors import BillhookError
from billhook.methods.quantize.ggml import GGML
from billhook.plan.levels import Types
from billhook.plan.storage import block
from billhook.registry import hint
from billhook.store.files import read_json
from billhook.store.gguf_file import read_gguf


def like_types(path: Path, source: Path, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, str]) -> Types:
    """The types that tensors have in the GGUF file `path`.

    `shapes` are those of all tensors on disk of the model directory `source`; `wanted` maps what is to be quantized to
    its names on disk. Raises BillhookError, naming the tensor, where the file is of another model, or holds a type that
    cannot be made.
    """
    file, config = read_gguf(path), read_json(source / "config.json", "configuration")
    arch = gguf_family(config).arch
    if file.arch != arch:
        raise BillhookError(f"{path} is a file of {file.arch} models, and {source.name} becomes one of {arch} models.")
    names = {name: tensor for tensor in gguf_tensors(config, shapes) for name in tensor.sources}
    types: Types = {}
    for name, on_disk in wanted.items():
        tensor = names[on_disk]
        entry = file.tensors.get(tensor.name)
        if entry is None:
            near = hint(tensor.name, file.tensors)
            raise BillhookError(f"{path} has no {tensor.name}, which {on_disk} becomes: another model?{near}")
        if entry.shape != tensor.shape:
            there, here = ("x".join(map(str, shape)) for shape in (entry.shape, tensor.shape))
            raise BillhookError(f"{path} holds {tensor.name} as {there}, and in the model it is {here}: another model.")
        if entry.type not in GGML:
            made = f"{path} holds {tensor.name} as {entry.type}, which is no type to quantize to"
            raise BillhookError(f"{made}: leave it out with --ignore {name}, or choose another file.")
        if shapes[on_disk][-1] % block(entry.type):
            raise BillhookError(f"{path} holds {tensor.name} as {entry.type}, whose blocks do not divide its columns.")
        types[name] = entry.type
    return types
