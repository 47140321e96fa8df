"""The interface of a task: the class that opens a model, its inputs, and the scoring of its predictions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.engine.batch import Batch, main_input, rows_of, select_rows
from billhook.evaluation.scoring import Scoring
from billhook.images.pixels import digest
from billhook.text.corpus import source_name
from billhook.text.windows import Tokens, Windows

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Home:
    """A model's directory, with its tokenizer or processor (None: built in memory), and whether its code may run.

    `skip_unreadable` leaves out the images of a SOURCE that cannot be read; otherwise they are refused.
    """

    directory: Path | None = None
    trust_remote_code: bool = False
    skip_unreadable: bool = False

    def directory_of(self, model: PreTrainedModel) -> Path | None:
        """The directory, or the one from which a model in memory was loaded."""
        return self.directory or (Path(model.name_or_path) if model.name_or_path else None)


@dataclass(frozen=True)
class Drawing:
    """How calibration samples are drawn: `samples` windows of `length` tokens (None: from the model's context).

    `sampling` is "packed" or "papers", `bos` "auto", "yes" or "no" (`billhook.text.windows`). With `fewer`, a short
    SOURCE gives fewer samples.
    """

    samples: int = 128
    length: int | None = None
    seed: int = 0
    sampling: str = "packed"
    bos: str = "auto"
    fewer: bool = False

    def samples_of(self, there: int) -> int:
        """How many samples are drawn of so many that are there."""
        return min(self.samples, there) if self.fewer else self.samples

    @property
    def held_out(self) -> int:
        """How many more windows are drawn, on which what was lost is measured: an eighth as many, at least four."""
        return max(4, self.samples // 8)


@dataclass(frozen=True)
class Samples:
    """Inputs drawn from a SOURCE, one a row; `digest` is the SHA-256 of their values, `bos` and `prefix` (of text
    only) as in `billhook.text.windows.Tokens`.

    `heldout` are more of them, which are used for nothing but to measure what was lost; None where the text has none.
    `skipped` of the SOURCE cannot be read.
    """

    batch: Batch
    source: str
    digest: str
    sampling: str
    bos: bool | None = None
    heldout: Batch | None = None
    skipped: int = 0
    prefix: tuple[int, ...] = ()

    @classmethod
    def of(cls, batch: Callable[[Tensor], Batch], tokens: Tokens) -> "Samples":
        """The samples that `batch` makes of the windows of `tokens`."""
        heldout = None if tokens.heldout is None else batch(tokens.heldout)
        return cls(
            batch(tokens.ids), source=tokens.source, digest=tokens.digest, sampling=tokens.sampling, bos=tokens.bos,
            heldout=heldout, prefix=tokens.prefix,
        )  # fmt: skip

    @classmethod
    def split(
        cls, batch: Batch, samples: int, model: PreTrainedModel, source: str, sampling: str, *, skipped: int = 0
    ) -> "Samples":
        """The first `samples` rows of a batch, with the others, if there are more, held out."""
        own, more = (select_rows(batch, part) for part in (slice(0, samples), slice(samples, None)))
        heldout = more if rows_of(batch) > samples else None
        return cls(own, source, digest(main_input(model, own)), sampling, None, heldout, skipped)

    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        """What identifies them, in tables and billhook.json."""
        inputs = main_input(model, self.batch)
        found: dict[str, Any] = {"source": source_name(self.source), "digest": self.digest, "sampling": self.sampling}
        found |= {"skipped": self.skipped} if self.skipped else {}
        if inputs.ndim == 2:
            return found | {"bos": self.bos, "samples": len(inputs), "length": inputs.shape[1]}
        return found | {"samples": len(inputs), "pixels" if inputs.ndim == 4 else "features": list(inputs.shape[-2:])}

    def __len__(self) -> int:
        return rows_of(self.batch)


class Task(Scoring, Protocol):
    """A kind of model, named as the pipeline of transformers; `auto_class` is the Auto class that opens the model."""

    name: str
    auto_class: str

    @property
    def stacks(self) -> str:
        """The stacks that are pruned by default: all, or language."""
        ...

    def samples(
        self, source: Any, model: PreTrainedModel, home: Home, drawing: Drawing, progress: Progress = lambda step: None
    ) -> Samples:
        """Draw calibration samples from a SOURCE."""
        ...

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The model's own training loss on a batch, a scalar, in evaluation mode."""
        ...


class Inputs(Protocol):
    """The inputs of a SOURCE that are scored one by one."""

    @property
    def source(self) -> str:
        """The SOURCE, as it was named."""
        ...

    def batches(self, limit: int | None) -> Iterator[Batch]:
        """All inputs in their order, or the first `limit`, a few at a time."""
        ...


@runtime_checkable
class RowTask(Task, Protocol):
    """A task that predicts one thing for a whole input, such as the class of an image."""

    def inputs(self, source: Any, model: PreTrainedModel, home: Home) -> Inputs:
        """The inputs of a SOURCE that are scored."""
        ...


@runtime_checkable
class WindowTask(Task, Protocol):
    """A task that predicts tokens of windows of text."""

    def evaluation(
        self,
        source: str,
        tokenizer: Tokenizer | None,
        model: PreTrainedModel,
        length: int,
        limit: int | None = None,
        *,
        bos: str = "auto",
    ) -> tuple[Windows, Scoring]:
        """Windows of `length` tokens of a SOURCE, at most `limit` of them, and how they are scored."""
        ...
