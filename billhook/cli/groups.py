"""Options that several commands have in a row: one class each, and the decorator that gives them to typer one by
one."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from billhook.cli.common import BatchSize, Calibration, Device, Dtype, Ignore, Length, Published, Samples, Seed, Targets


@dataclass(frozen=True)
class Text:
    """The calibration windows."""

    calibration: Calibration = None
    samples: Samples = 128
    length: Length = None
    published: Published = False


@dataclass(frozen=True)
class Work:
    """How to compute, and which layers take part."""

    batch_size: BatchSize = None
    seed: Seed = 0
    targets: Targets = None
    ignore: Ignore = None
    device: Device = "cpu"
    dtype: Dtype = "auto"

    def fields(self) -> dict[str, Any]:
        """The fields of a request; patterns that were not given are none."""
        return {**vars(self), "targets": self.targets or (), "ignore": self.ignore or ()}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of a group in the place of the parameter that is annotated with it; the command is called with
    the group."""
    signature = inspect.signature(command)
    groups: dict[str, Callable[..., Any]] = {
        x.name: x.annotation for x in signature.parameters.values() if x.annotation in (Text, Work)
    }
    inside = {name: inspect.signature(group).parameters for name, group in groups.items()}

    @functools.wraps(command)
    def run(**options: Any) -> None:
        made = {
            name: group(**{option: options.pop(option) for option in inside[name]}) for name, group in groups.items()
        }
        command(**options, **made)

    listed = [x for own in signature.parameters.values() for x in inside.get(own.name, {own.name: own}).values()]
    shown = signature.replace(parameters=[x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in listed])
    run.__signature__ = shown  # type: ignore[attr-defined]
    return run
