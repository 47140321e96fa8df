"""Hidden states: the output of every block is compared with the dense model's, as in SquareHead.

    mean over blocks l and windows of  |H_l − H'_l|² / |H'_l|²,   H' of the dense model

Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023, arXiv:2310.06927
(SquareHead), without the loss on text that is added there. Each block and each window counts the same, however large
its hidden states are. Where blocks were removed, a block is compared with what the next one that stayed received in the
dense model.

Limits: it says nothing about the head, and needs hidden states of equal shape in both models.
"""

import torch
from torch import Tensor

from billhook.engine.batch import Batch
from billhook.recovery.outputs import Outputs, Predictor
from billhook.registry import method


def difference(student: Outputs, teacher: Outputs) -> Tensor:
    """The normalized squared difference of hidden states [rows, ..., width], mean over rows and blocks, a scalar."""
    pairs = zip(student.hidden, teacher.hidden, strict=True)
    return torch.stack([_each(a.float() - b.float()) / _each(b.float()).clamp_min(1e-30) for a, b in pairs]).mean()


def _each(states: Tensor) -> Tensor:
    """The sum of squares of each row."""
    return states.flatten(1).square().sum(1)


@method(paper="SquareHead: Kurtic et al. 2023, arXiv:2310.06927", needs=("teacher", "hidden"))
def hidden(student: Predictor, teacher: Predictor, batch: Batch) -> Tensor:
    """The normalized squared difference of the hidden states after every block, a scalar."""
    return difference(student(batch), teacher(batch))
