"""The grid of a storage type, by its name."""

import re

import torch

from billhook.errors import BillhookError
from billhook.methods.quantize.ggml import GGML
from billhook.methods.quantize.grid import Grid
from billhook.methods.quantize.scalar import Scalar
from billhook.plan import storage


def grid_of(type: str, scale_dtype: torch.dtype = torch.float16) -> Grid:
    """The grid of a storage type; scales of scalar types are stored in `scale_dtype`.

    Raises BillhookError for an unknown type, and for one without a grid, such as f16.
    """
    storage.bits(type)
    if scalar := re.fullmatch(r"int(\d)/(\d+)", type):
        return Scalar(int(scalar[1]), int(scalar[2]), scale_dtype)
    if type in GGML:
        return GGML[type]
    known = f"{', '.join(GGML)}, or intB/GROUP with B from 2 to 8, such as int4/64"
    raise BillhookError(f"Billhook cannot quantize to {type}: use {known}.")
