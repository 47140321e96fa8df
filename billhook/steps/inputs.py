"""The fields that requests to quantize, compress, slim and recover share: how model and text are opened, and the result
is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from billhook.export.gguf import GgufForm
from billhook.plan.bytes import parse_size
from billhook.steps.request import UNCHECKED, Request
from billhook.store.arguments import check_fields
from billhook.text.given import Given


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How a request opens model and text and writes its result; `Request` has most fields."""

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

    def _opened_with(self, **changes: Any) -> Request:
        """The request for a model and its text, with `changes`."""
        shared = self.__dataclass_fields__.keys() & Request.__dataclass_fields__.keys()
        return Request(**({name: getattr(self, name) for name in shared} | {"options": {}} | changes))


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
