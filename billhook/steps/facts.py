"""What identifies a model in tables, plans and records, and how it was computed."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from billhook import __version__
from billhook.store.checkpoint import model_digest
from billhook.store.compute import dtype_name


def model_facts(source: Path | None, model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a model in tables, plans and billhook.json."""
    facts = {"name": _model_name(source, model), "type": model.config.model_type}
    return facts | {"digest": None if source is None else model_digest(source)}


def computed_in(model: PreTrainedModel) -> dict[str, str]:
    """The dtype and the kind of device in which a model is computed."""
    return {"dtype": dtype_name(model.dtype), "device": model.device.type}


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that computed."""
    libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), **libraries}


def all_versions() -> dict[str, str]:
    """The same, with Billhook's own."""
    return {"billhook": __version__, **versions()}


def _model_name(source: Path | None, model: PreTrainedModel) -> str:
    """OWNER/NAME for a folder of the hub's cache, else the folder's name; for a model in memory, its class."""
    if source is None:
        return type(model).__name__
    if source.parent.name == "snapshots":
        return source.parents[1].name.removeprefix("models--").replace("--", "/")
    return source.resolve().name
