"""What the cells of a comparison are scored on: windows of a text, or images and other inputs."""

from typing import Any, Protocol

from transformers import PreTrainedModel

from billhook.engine.batch import Batch, join_rows, main_input, rows_of, split_rows
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.predicting import rows_at_once
from billhook.evaluation.quality import Reference
from billhook.evaluation.rows import evaluate_rows
from billhook.evaluation.scoring import Scoring
from billhook.images.pixels import digest as digest_of_pixels
from billhook.steps.inputs import ModelRequest
from billhook.steps.request import Opened
from billhook.tasks.base import Home, RowTask, WindowTask
from billhook.tasks.token_windows import tokenizer_of, window_length
from billhook.text.corpus import source_name
from billhook.text.windows import Windows


class Scored(Protocol):
    """Data on which models are scored; `batch` are its inputs, `data` what identifies it."""

    batch: Batch
    data: dict[str, Any]
    protocol: str

    def note(self, dense: PreTrainedModel) -> None:
        """Note what scores need of the dense model, once everything about the comparison is checked."""
        ...

    def scores(self, model: PreTrainedModel) -> dict[str, Any]:
        """The scores of a model as they are written to compare.json: `nll`, `token_ppl`, and those of images."""
        ...


def scored(opened: Opened, request: ModelRequest, data: str, limit: int | None) -> Scored:
    """Read the data for a model that is still dense; raises BillhookError as its task does."""
    home = Home(opened.source, request.trust_remote_code, request.skip_unreadable)
    if isinstance(opened.task, RowTask):
        found = opened.task.inputs(data, opened.model, home)
        return ScoredRows(opened.model, join_rows(found.batches(limit)), opened.task, source_name(data))
    assert isinstance(opened.task, WindowTask)
    tokenizer, length = tokenizer_of(opened.model, home), window_length(opened.model, request.length)
    bos = "no" if request.published and request.bos == "auto" else request.bos
    windows, scoring = opened.task.evaluation(data, tokenizer, opened.model, length, limit, bos=bos)
    return ScoredWindows(windows, scoring)


class ScoredWindows:
    """Windows of a text, scored by perplexity."""

    def __init__(self, windows: Windows, scoring: Scoring) -> None:
        self.windows, self.scoring, self.batch = windows, scoring, scoring.batch(windows.ids)
        self.protocol = scoring.protocol
        about = {"source": source_name(windows.source), "digest": windows.digest, "bos": windows.bos}
        self.data: dict[str, Any] = about | dict(zip(("windows", "length"), windows.ids.shape, strict=True))

    def note(self, dense: PreTrainedModel) -> None:
        """Nothing: perplexity is not relative to a model."""

    def scores(self, model: PreTrainedModel) -> dict[str, Any]:
        """The record of the evaluation."""
        return evaluate(model, self.windows, scoring=self.scoring).to_dict()


class ScoredRows:
    """Images or other inputs, scored by accuracy and by the divergence from the dense model."""

    def __init__(self, model: PreTrainedModel, batch: Batch, scoring: Scoring, source: str) -> None:
        self.batch, self.scoring, self.protocol = batch, scoring, scoring.protocol
        inputs = main_input(model, batch)
        about = {"source": source, "digest": digest_of_pixels(inputs), "bos": None, "windows": rows_of(batch)}
        self.data: dict[str, Any] = about | {"length": inputs.shape[1 if inputs.ndim == 2 else -1]}

    def note(self, dense: PreTrainedModel) -> None:
        """Record the dense model's predictions."""
        self.reference = Reference.of(dense, self.batch, self.scoring, self.data["source"])

    def scores(self, model: PreTrainedModel) -> dict[str, Any]:
        """`top1` or `exact_match`, `kl` or `cosine`; `nll` is the divergence where labels are not known."""
        rows = split_rows(self.batch, rows_at_once(model, self.batch))
        own = evaluate_rows(model, rows, self.scoring).to_dict()
        lost = self.reference.compare(model)
        found = {key: value for key, value in (("kl", lost.kl), ("cosine", lost.cosine)) if value is not None}
        far = lost.kl if lost.kl is not None else 1 - (lost.cosine or 0.0)
        keys = ("top1", "top1_error", "top5", "exact_match", "exact_match_error", "nll")
        return {"nll": far, "token_ppl": None, **found, **{key: own[key] for key in keys if key in own}}
