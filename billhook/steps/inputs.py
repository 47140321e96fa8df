"""The fields that all requests share: how model and text are opened, and the result is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel

from billhook.engine.activation_store import SPILL_GIB
from billhook.export.gguf import GgufForm
from billhook.plan.bytes import parse_size
from billhook.store.arguments import check_fields
from billhook.tasks.base import Drawing
from billhook.text.given import Given

UNCHECKED = ("model", "calibration")  # fields whose types are checked, and explained, where they are opened


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How a request opens model and text and writes its result. `calibration` is a SOURCE's name, or data; with
    `published`, samples are drawn as in the papers' code."""

    calibration: Given | None = None
    samples: int = 128
    length: int | None = None
    bos: str = "auto"
    skip_unreadable: bool = False
    published: bool = False
    batch_size: int | None = None
    seed: int = 0
    targets: str | Sequence[str] = ()
    ignore: str | Sequence[str] = ()
    stacks: str | Sequence[str] = ()
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False
    resume: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self, but=UNCHECKED)

    @classmethod
    def given(cls, **fields: Any) -> Self:
        """A request from keyword arguments: its fields, and options of the method."""
        known = {key: value for key, value in fields.items() if key in cls.__dataclass_fields__}
        options = {**(fields.get("options") or {}), **{key: fields[key] for key in fields.keys() - known.keys()}}
        return cls(**{**known, "options": options})

    @property
    def drawing(self) -> Drawing:
        """How calibration samples are drawn."""
        return Drawing(self.samples, self.length, self.seed, "papers" if self.published else "packed", self.bos)

    @property
    def selection(self) -> dict[str, list[str]]:
        """What chooses the layers, as in billhook.json."""
        return {key: listed(getattr(self, key)) for key in ("targets", "ignore", "stacks")}

    @property
    def loading(self) -> dict[str, Any]:
        """How the weights are loaded."""
        return {key: getattr(self, key) for key in ("dtype", "device", "trust_remote_code")}

    def _model_request(self, **changes: Any) -> "ModelRequest":
        """The model and the text of a request, with `changes`."""
        shared = self.__dataclass_fields__.keys() & ModelRequest.__dataclass_fields__.keys()
        return ModelRequest(**({name: getattr(self, name) for name in shared} | changes))


@dataclass(frozen=True)
class ModelRequest(Inputs):
    """A model and a text to open, and where the result is written."""

    model: str | Path | PreTrainedModel
    output: str | Path | None = field(default=None, kw_only=True)
    spill_gib: float = field(default=SPILL_GIB, kw_only=True)


def listed(patterns: str | Sequence[str]) -> list[str]:
    """Patterns as a list; a string is a single pattern."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


@dataclass(frozen=True, kw_only=True)
class GgufInputs(Inputs):
    """The same for a result that can be a GGUF file, whose `template` and `split_size` are as in `export`."""

    template: str | Path | None = None
    split_size: str | int | None = None

    @property
    def gguf_form(self) -> GgufForm:
        """The options of a GGUF file."""
        template = None if self.template is None else Path(self.template).expanduser()
        return {"template": template, "split": None if self.split_size is None else parse_size(self.split_size)}
