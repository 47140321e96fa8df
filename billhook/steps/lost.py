"""What a step has lost: the dense model's predictions before it, compared with those of the model afterwards."""

from typing import Protocol

from transformers import PreTrainedModel

from billhook.engine.batch import select_rows
from billhook.engine.resources import Resources
from billhook.errors import BillhookError, JobError
from billhook.evaluation.quality import Loss, Reference
from billhook.steps.request import Opened
from billhook.text.corpus import source_name


class Lost(Protocol):
    """What a model has lost, by default the opened one as it is now; None if that is not known."""

    def __call__(self, model: PreTrainedModel | None = None, resources: Resources | None = None) -> Loss | None:
        """The loss of a model of the same vocabulary."""
        ...


def loss_of(opened: Opened, windows: int) -> Lost:
    """Record the dense model's predictions, and return a function that says what the model has lost when it is called.

    Where the samples have no held-out rows, the first `windows` of them are scored. There is no answer (None) without
    text, and for a model or text that gives nothing to predict.
    """
    samples, model, resources = opened.samples, opened.model, opened.resources
    if samples is None:
        return lambda model=None, resources=None: None
    held_out = samples.heldout is not None
    batch = samples.heldout or select_rows(samples.batch, slice(0, windows))
    source = source_name(samples.source)
    try:
        reference = Reference.of(model, batch, opened.task, source, held_out=held_out, resources=resources)
    except JobError:
        raise
    except BillhookError:  # nothing is masked
        return lambda model=None, resources=None: None

    def lost(model: PreTrainedModel | None = None, resources: Resources | None = None) -> Loss:
        return reference.compare(model or opened.model, resources or opened.resources)

    return lost
