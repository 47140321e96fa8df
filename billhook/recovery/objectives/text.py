"""Text: the task's own loss, as in ordinary fine-tuning.

The mean negative log-likelihood, in nats, of the next tokens, of masked tokens, or of the classes of images. It needs
no dense model, and on little text it recovers less than `kl` does: it learns the text too.
"""

from torch import Tensor
from torch.nn import functional

from billhook.engine.batch import Batch
from billhook.errors import BillhookError
from billhook.images.labels import UNKNOWN
from billhook.recovery.outputs import Outputs, Predictor
from billhook.registry import method


def likelihood(student: Outputs) -> Tensor:
    """The mean negative log-likelihood of the labels, a scalar; raises BillhookError where they are not known."""
    if bool((student.labels == UNKNOWN).any()):
        raise BillhookError("The objective text needs labels, and there are none: use --objective kl.")
    return functional.cross_entropy(student.predictions.float(), student.labels)


@method(paper="the task's own loss")
def text(student: Predictor, teacher: Predictor | None, batch: Batch) -> Tensor:
    """The mean negative log-likelihood of the batch's labels, a scalar; the teacher is not used."""
    return likelihood(student(batch))
