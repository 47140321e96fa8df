"""The storage type of every tensor of a model that is quantized, and where it is on disk."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.streaming import Stream
from billhook.errors import BillhookError, ignoring
from billhook.export import compressed_tensors
from billhook.export.gguf import GgufForm, gguf_bytes
from billhook.methods.quantize.ggml import GGML
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.scalar import Scalar
from billhook.plan.plan import Budget, Plan
from billhook.plan.spec import Spec
from billhook.plan.storage import BLOCKS, bits, block, stored_bytes
from billhook.steps.parts import Parts
from billhook.steps.request import Opened
from billhook.store.gguf_file import require_gguf

GROUPS = (64, 32, 16, 8)  # of a scalar type without a group: the first that divides a layer's columns
EMBEDDINGS = "q6_k"  # of embeddings and head in a GGUF file, where `quantize` is not told otherwise


def full_name(type: str) -> str:
    """A type with its group: int4 is int4/64. Raises BillhookError for a type without a grid."""
    name = f"{type}/{GROUPS[0]}" if type.startswith("int") and "/" not in type else type
    grid_of(name)
    return name


def is_ggml(type: str) -> bool:
    """Whether a type belongs in a GGUF file."""
    return type in GGML


def fitting(type: str, columns: int) -> str:
    """The type, or the one that takes its place where its blocks do not divide `columns`.

    That is the same scalar type with a smaller group, or the smallest GGUF type of at least as many bits whose blocks
    divide them. Raises BillhookError where there is none.
    """
    if columns % block(type) == 0:
        return type
    grid = grid_of(type)
    if isinstance(grid, Scalar):
        smaller = [f"int{grid.bits}/{g}" for g in GROUPS if g < grid.group and columns % g == 0]
    else:
        larger = [t for t in GGML if columns % block(t) == 0 and bits(t) >= bits(type)]
        smaller = sorted(larger, key=lambda t: (bits(t), t))
    if not smaller:
        raise BillhookError(f"a layer with {columns} columns cannot be stored as {type}")
    return smaller[0]


def uniform_plan(type: str, layers: Sequence[Layer]) -> tuple[Plan, list[str]]:
    """The plan of one type everywhere, and a note on the layers that its blocks do not divide."""
    weights: dict[str, Spec] = {}
    others: dict[str, list[str]] = {}
    problems: dict[str, BillhookError] = {}
    for layer in layers:
        try:
            name = fitting(type, layer.shape[1])
        except BillhookError as error:
            problems[layer.name] = error
            continue
        weights[layer.name] = Spec(type=name)
        if name != type:
            others.setdefault(name, []).append(layer.name)
    if problems:
        name, advice = next(iter(problems)), f"Leave out what does not fit: {ignoring(list(problems))}."
        advice = advice if weights else "No layer fits: use another type."
        raise BillhookError(f"{name}: {problems[name]}. {advice}")
    total = sum(stored_bytes(weights[layer.name].type or "", layer.shape) for layer in layers)
    notes = [
        f"{len(names)} layers, such as {names[0]}, are stored as {name}: their columns do not divide by {block(type)}."
        for name, names in others.items()
    ]
    made_by = {"allocator": "uniform", "options": {"type": type}}
    return Plan(Budget("bytes", total), weights, made_by=made_by), notes


def plan_types(plan: Plan) -> Mapping[str, str]:
    """The type of every layer of a plan of storage types."""
    return {name: spec.type or "" for name, spec in plan.weights.items()}


def check_target(ggml: bool) -> None:
    """Raise BillhookError unless the package that defines the files to be written is installed."""
    (require_gguf if ggml else compressed_tensors.check_installed)()


def scale_dtype(opened: Opened, parts: Parts) -> torch.dtype:
    """The dtype of the scales of scalar types: bfloat16 where the layers are, otherwise float16."""
    stream = opened.resources.stream
    assert stream is not None
    dtypes = {stream.source[part.tensor].dtype for several in parts.values() for part in several}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float16


def outside_of(opened: Opened, plan: Plan, type: str) -> dict[str, str]:
    """The types of embeddings and head, by their names on disk: `type`, or else those of a plan that `compress` made.

    Raises BillhookError for a plan of another model.
    """
    stream = opened.resources.stream
    assert stream is not None
    shapes, given = outside_matrices(opened.model, stream), plan.made_by.get("outside")
    if type or not given:
        return {name: fitting(type or EMBEDDINGS, shape[1]) for name, shape in shapes.items()}

    def fits(name: str, t: object) -> bool:
        return isinstance(t, str) and is_ggml(t) and name in shapes and shapes[name][1] % block(t) == 0

    if not isinstance(given, Mapping) or not all(fits(name, t) for name, t in given.items()):
        raise BillhookError(f"The plan has types for embeddings or head that this model does not have: {given!r:.200}.")
    return dict(given)


def block_bytes(opened: Opened, types: Mapping[str, str]) -> int:
    """The size of the files of blocks (`billhook.steps.block_files`) in which matrices, by their names on disk, have
    these types and all others their bytes."""
    stream = opened.resources.stream
    assert stream is not None
    kept = [stored.entry for name, stored in stream.source.items() if name not in types]
    shapes = {name: stream.source[name].entry.shape for name in types}
    rows = {name: prod(shape[:-1]) for name, shape in shapes.items()}
    return sum(stored_bytes(t, (rows[name], shapes[name][-1])) for name, t in types.items()) + sum(
        entry.stop - entry.start for entry in kept
    )


def file_bytes(opened: Opened, types: Mapping[str, str], quantizer: str, form: GgufForm) -> int:
    """The size of the GGUF file of the `form` (`GgufInputs.gguf_form`) in which matrices, by their names on disk, have
    these types.

    Raises BillhookError for a model that has no form in such files.
    """
    stream, empty = opened.resources.stream, {}
    assert stream is not None
    assert opened.source is not None
    for name, type in types.items():
        *out, columns = stream.source[name].entry.shape
        width, size = BLOCKS[type]
        empty[name] = (type, np.broadcast_to(np.zeros((), np.uint8), (*out, columns // width * size)))
    return gguf_bytes(opened.source, empty, facts=file_facts(opened, quantizer), **form)


def file_facts(opened: Opened, quantizer: str) -> dict[str, str]:
    """What the metadata of a GGUF file says about how it was made."""
    before = [] if opened.history is None else [step.step for step in opened.history.steps]
    steps = ", ".join([*before, "quantize"])
    return {"source.digest": str(opened.facts["digest"]), "steps": steps, "quantizer": quantizer}


def outside_matrices(model: PreTrainedModel, stream: Stream) -> dict[str, tuple[int, int]]:
    """Embeddings and head: their names on disk and shapes; a tied head is not named."""
    inside = {name for names in stream.names for name in names}
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    shapes = {tuple(m.weight.shape) for m in modules if getattr(m, "weight", None) is not None}  # a module of patches
    return {
        name: (entry.entry.shape[0], entry.entry.shape[1])
        for name, entry in stream.source.items()
        if name not in inside and tuple(entry.entry.shape) in shapes
    }


def outside_parameter(model: PreTrainedModel, name: str) -> Tensor:
    """The parameter of embeddings or head that is called `name` on disk."""
    for full in (name, f"{model.base_model_prefix}.{name}"):
        if full in model.state_dict():
            return model.get_parameter(full).detach()
    raise BillhookError(f"{name} is not a parameter of the model under that name, which quantize does not support.")
