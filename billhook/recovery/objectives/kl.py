"""KL: the predictions of the dense model, all of them at every position.

    mean over scored positions of KL(P ‖ Q),   P of the dense model, Q of the pruned one

in nats (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, at temperature 1). For
models that give embeddings instead of predictions it is 1 - cosine. It needs no labels.

Cost: a forward pass of the dense model for every batch.
"""

from torch import Tensor

from billhook.engine.batch import Batch
from billhook.recovery.outputs import Predictor
from billhook.registry import method


@method(paper="Hinton et al. 2015, arXiv:1503.02531", needs=("teacher",))
def kl(student: Predictor, teacher: Predictor, batch: Batch) -> Tensor:
    """The mean divergence of the student's predictions from the teacher's, a scalar."""
    return student(batch).divergence_from(teacher(batch))
