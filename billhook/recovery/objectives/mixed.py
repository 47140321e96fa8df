"""Mixed: a third each of text, the dense model's predictions on it, and its predictions on the student's own text.

    (−log Q(text)  +  KL(P ‖ Q) on the text  +  KL(P ‖ Q) on windows that the student wrote) / 3

as in ELSA (ICLR 2026), which prunes while it trains; here the zeros are fixed. Text of the student's own shows it the
states into which its own errors lead. It is sampled from the student at temperature 1, anew several times in a run.

Cost: a second forward and backward pass, and the time that writing takes; only for models that write text.
"""

from torch import Tensor

from billhook.engine.batch import Batch
from billhook.recovery.objectives.text import likelihood
from billhook.recovery.outputs import Predictor
from billhook.registry import method


@method(paper="ELSA, ICLR 2026", needs=("teacher", "written"))
def mixed(student: Predictor, teacher: Predictor, batch: Batch) -> Tensor:
    """A third each of the loss on text and the divergence on text and on `batch["written"]`, int64 [rows, length]."""
    on_text = {name: value for name, value in batch.items() if name != "written"}
    ours, own = student(on_text), {"input_ids": batch["written"]}
    on_policy = student(own).divergence_from(teacher(own))
    return (likelihood(ours) + ours.divergence_from(teacher(on_text)) + on_policy) / 3
