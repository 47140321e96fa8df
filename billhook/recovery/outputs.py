"""What an objective sees of a model: its predictions for a batch, their labels, and its hidden states."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.config import call_options, predictions
from billhook.architectures.stacks import blocks_of
from billhook.engine.batch import Batch, model_inputs
from billhook.engine.replay import states_of
from billhook.evaluation.divergence import Divergence
from billhook.evaluation.scoring import IGNORED, Scoring


@dataclass(frozen=True)
class Outputs:
    """Scored `predictions` [n, classes] with `labels` int64 [n], and `hidden` states [rows, ..., width] after blocks.

    The predictions of a teacher may be what `divergence` keeps of them (`billhook.evaluation.divergence`).
    """

    predictions: Any
    labels: Tensor
    hidden: Sequence[Tensor]
    divergence: Divergence

    def divergence_from(self, teacher: "Outputs") -> Tensor:
        """The mean divergence from the teacher's predictions, a scalar, in nats for a KL divergence."""
        return self.divergence.each(self.predictions, teacher.predictions).mean()


Predictor = Callable[[Batch], Outputs]


def predictor(
    model: PreTrainedModel, scoring: Scoring, blocks: Sequence[int] | None = None, *, gradients: bool = True
) -> Predictor:
    """The function from a batch to the outputs of `model` as it then is.

    The hidden states are those after the `blocks` of these numbers (None: none). Autograd follows with `gradients`.
    """
    modules = [] if blocks is None else [list(blocks_of(model).values())[number] for number in blocks]

    def run(batch: Batch) -> Outputs:
        with torch.set_grad_enabled(gradients), _captured(modules) as hidden:
            output = predictions(model, model(**model_inputs(model, batch), **call_options(model)))
            logits, labels = scoring.scored(output, batch)
            kept = labels != IGNORED
            chosen = logits.flatten(0, 1) if bool(kept.all()) else logits[kept]
            return Outputs(chosen, labels[kept], list(hidden), scoring.divergence)

    return run


@contextmanager
def _captured(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of modules, in the order in which they run."""
    found: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(states_of(output))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        yield found
