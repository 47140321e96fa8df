"""Find the task of a model, and open a model directory with the class of its task."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.ambient import pinned
from billhook.architectures.sources import resolve
from billhook.errors import BillhookError
from billhook.store.checkpoint import class_names, load, read_config
from billhook.tasks import TASKS
from billhook.tasks.base import Task


def tasks() -> Iterator[Task]:
    """All tasks; those of plugins come last, and are looked for only when they are reached."""
    yield from map(TASKS.get, TASKS.built_in)
    yield from (TASKS.get(name) for name in TASKS.names() if name not in TASKS.built_in)  # type: ignore[misc]


def task_of(model: PreTrainedModel) -> Task:
    """The task of a model in memory, from its class; raises BillhookError for a class of no task."""
    name = type(model).__name__
    return _named(name, [name], model.config.to_dict())


def task_of_config(path: Path, config: dict[str, Any]) -> Task:
    """The task of a model directory, from its config.json; raises BillhookError if there is none."""
    return _named(str(path), config.get("architectures") or [], config)


def continues_text(task: Task) -> bool:
    """Whether the models of a task continue a prompt."""
    return bool(getattr(task, "continues_text", False))


def _named(who: str, classes: list[str], config: dict[str, Any]) -> Task:
    own_code = config.get("auto_map") or {}
    for task in tasks():
        known = class_names(task.auto_class)
        by_class = {name for names in known.values() for name in names}.intersection(classes)
        by_type = not classes and config.get("model_type") in known
        fits = bool(config.get("is_encoder_decoder")) == getattr(task, "encoder_decoder", False)
        if (by_class or by_type or task.auto_class in own_code) and fits:
            return task
    kind = ", ".join(classes) or config.get("model_type", "a model without a type")
    *names, last = TASKS.names()
    raise BillhookError(f"{who} is {kind}: only models for {', '.join(names)} and {last} can be pruned.")


@pinned
def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantized: bool = False,
) -> PreTrainedModel:
    """Load a model directory (or hub name) in evaluation mode.

    "auto" is the GPU if there is one, and there the checkpoint's dtype; on a processor it is float32. With `quantized`,
    a model quantized for compressed-tensors is loaded with its weights decoded. Raises BillhookError for a model
    without a task, and if tensors are missing, unexpected, or do not have the shape of the configuration.
    """
    path = resolve(path)
    task = task_of_config(path, read_config(path, quantized=quantized))
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    return load(path, task.auto_class, **options, quantized=quantized)
