"""The `quantization_config` of a model quantized for compressed-tensors, and whether stock transformers opens it.

The model is loaded as a reader would load it, from tensors without values. What fails is the code of some models:
initializers that read the weight of a linear layer, which has none while it is packed, and renamings on loading that
do not know the names of packed tensors.
"""

import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from copy import deepcopy
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.export import compressed_tensors
from billhook.methods.quantize.grid import Grid
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.scalar import Scalar
from billhook.steps.parts import Parts
from billhook.steps.request import Opened
from billhook.store import checkpoint
from billhook.store.files import in_one_line, out_of_memory


def configuration(model: PreTrainedModel, parts: Parts, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """The `quantization_config` of config.json for the layers of `parts`, given the grids of their tensors on disk;
    every linear layer that is not quantized is named in it."""
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    types = {layer: grids[several[0].tensor] for layer, several in parts.items()}
    return compressed_tensors.configuration(types, linear - types.keys())


def check_opens(opened: Opened, parts: Parts, types: Mapping[str, str]) -> None:
    """Raise BillhookError, with what to leave out, where transformers cannot open the model with these types of its
    layers."""
    error = _failure(opened, parts, types)
    if error is None:
        return
    stacks: dict[str, dict[str, str]] = {}
    for name in types:
        stacks.setdefault(re.split(r"\.\d+(?:\.|$)", name)[0], {})[name] = types[name]
    failing = [stack for stack, some in stacks.items() if _failure(opened, parts, some) is not None]
    others = f"leave them out with {' '.join(f'--ignore {stack}' for stack in failing)}, or "
    raise BillhookError(
        f"transformers {transformers.__version__} cannot open a {type(opened.model).__name__} in which layers of "
        f"{', '.join(failing or stacks)} have types intB/GROUP ({in_one_line(error)}): "
        f"{others if 0 < len(failing) < len(stacks) else ''}use a GGUF type, such as q4_k (compress: --for gguf)."
    )


def _failure(opened: Opened, parts: Parts, types: Mapping[str, str]) -> Exception | None:
    """What transformers raises on opening the model with layers of these types, all others as they are."""
    stream, source = opened.resources.stream, opened.source
    assert stream is not None
    assert source is not None
    grids = {part.tensor: grid_of(types[name]) for name in types for part in parts[name]}
    device = "meta" if find_spec("accelerate") else "cpu"  # transformers needs accelerate for meta
    state = dict[str, Tensor]()
    for name, stored in stream.source.items():
        shape, grid = tuple(stored.entry.shape), grids.get(name)
        for key, size, dtype in [(name, shape, stored.dtype)] if grid is None else _packed(name, shape, grid):
            state[key] = torch.zeros((), dtype=dtype, device=device).expand(size)  # takes no memory
    config = deepcopy(opened.model.config)
    config.quantization_config = configuration(opened.model, {name: parts[name] for name in types}, grids)
    device_map = {"": "meta"} if device == "meta" else None
    try:
        with checkpoint.quiet(), redirect_stderr(StringIO()):
            checkpoint.from_pretrained(
                type(opened.model), source, None,
                dtype=opened.model.dtype, config=config, state_dict=state, device_map=device_map,
            )  # fmt: skip
    except Exception as error:  # of the code of any model
        if out_of_memory(error):
            raise
        return error
    return None


def _packed(name: str, shape: tuple[int, ...], grid: Grid) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of the tensors of a quantized weight [out, in]."""
    assert isinstance(grid, Scalar)
    out, columns = shape
    sizes = ((out, -(-columns * grid.bits // 32)), (out, columns // grid.group), (2,))
    dtypes = (torch.int32, torch.float16, torch.int64)
    return list(zip(compressed_tensors.names(name), sizes, dtypes, strict=True))
