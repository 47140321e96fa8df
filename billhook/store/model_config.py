"""config.json of a model directory, with the entries checked that `transformers` takes as they are."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from billhook.errors import BillhookError
from billhook.store.files import read_json
from billhook.store.shards import EXPLICIT
from billhook.store.typed_json import typed

_TYPES = {"model_type": str | None, "architectures": list[str] | None, "auto_map": dict[str, Any] | None}
_TYPES |= {EXPLICIT: str | None}
_DTYPES = ("dtype", "torch_dtype")  # the second in files of earlier versions
_QUANTIZED = ("quantization_config", "compression_config")


def model_config(path: Path) -> dict[str, Any]:
    """config.json of a directory; raises BillhookError where it is damaged, or holds NaN (Infinity is a limit that is
    not set) or a dtype that torch does not have."""
    file = path / "config.json"
    config = read_json(file, "model configuration", own=False)
    typed(_TYPES, config, str(file))
    for name, value in _values(config, ""):
        if isinstance(value, float) and math.isnan(value):
            raise BillhookError(f"{file}, {name} is NaN: write the number that it had, or download the file again.")
    _check_dtypes(config, str(file))
    return config


def _values(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The values inside objects and lists with their places, such as `text_config, rms_norm_eps`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inside is None:
        yield name, value
        return
    for key, item in inside:
        yield from _values(item, f"{name}, {key}" if name else str(key))


def _check_dtypes(config: dict[str, Any], where: str) -> None:
    """Check the dtype of a configuration and of those inside it."""
    for key in _DTYPES:
        found = config.get(key)
        for name in found.values() if isinstance(found, dict) else [found]:
            if name is not None and not (isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)):
                raise BillhookError(f"{where}, {key}: {name!r:.40} is not the name of a dtype, such as bfloat16.")
    for key, value in config.items():
        if key.endswith("_config") and key not in _QUANTIZED and isinstance(value, dict):
            _check_dtypes(value, f"{where}, {key}")
