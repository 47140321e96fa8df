"""The storage types of another GGUF file, tensor by tensor (`billhook compress --allocator like:FILE.gguf`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from billhook.architectures.gguf_names import GgufTensor, gguf_family, gguf_tensors
from billhook.errors import BillhookError
from billhook.export.gguf import full_config
from billhook.methods.quantize.ggml import GGML
from billhook.plan.levels import Types
from billhook.registry import hint
from billhook.store.gguf_file import GgufFile, read_gguf


def like_types(
    path: Path, source: Path, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Sequence[str]]
) -> Types:
    """The types that tensors have in the GGUF file `path`.

    `shapes` are those of all tensors on disk of the model directory `source`; `wanted` maps what is to be quantized to
    the tensors on disk that it consists of. Raises BillhookError, naming the tensor, where the file is of another
    model, or holds a type that cannot be made.
    """
    file, config = read_gguf(path), full_config(source)
    arch = gguf_family(config).arch
    if file.arch != arch:
        raise BillhookError(f"{path} is a file of {file.arch} models, and {source.name} becomes one of {arch} models.")
    becomes: dict[str, list[GgufTensor]] = {}
    for tensor in gguf_tensors(config, shapes):
        for name in tensor.sources:
            becomes.setdefault(name, []).append(tensor)
    types: Types = {}
    for name, tensors in wanted.items():
        is_layer = name not in tensors  # embeddings and head have their names on disk
        advice = f"leave it out with --ignore {name}, or choose another file" if is_layer else "choose another file"
        found = {_type(file, x, name, advice): x for on_disk in tensors for x in becomes[on_disk]}
        if len(found) > 1:
            listed = ", ".join(f"{tensor.name} as {type}" for type, tensor in found.items())
            raise BillhookError(f"{path} holds {listed}, and {name} is both: choose another file.")
        types[name] = next(iter(found))
    return types


def _type(file: GgufFile, tensor: GgufTensor, name: str, advice: str) -> str:
    """The type of one tensor of the file, which belongs to `name`; `advice` is what to do about one that is not
    quantized."""
    entry = file.tensors.get(tensor.name)
    if entry is None:
        near = hint(tensor.name, file.tensors)
        raise BillhookError(f"{file.path} has no {tensor.name}, which {name} becomes: another model?{near}")
    if entry.shape != tensor.shape:
        there, here = ("x".join(map(str, shape)) for shape in (entry.shape, tensor.shape))
        raise BillhookError(
            f"{file.path} holds {tensor.name} as {there}, and in the model it is {here}: another model."
        )
    if entry.type not in GGML:
        made = f"{file.path} holds {tensor.name} as {entry.type}, which is no type to quantize to"
        raise BillhookError(f"{made}: {advice}.")
    return entry.type
