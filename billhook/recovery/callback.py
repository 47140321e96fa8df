"""A callback that keeps pruned weights zero in transformers' Trainer, and in TRL and Axolotl, whose trainers are built
on it.

Masks are made when training begins: the model is wrapped then (accelerate, FSDP2), and a checkpoint is loaded. The
first FSDP and DeepSpeed's ZeRO-3 flatten parameters, which is an error.
"""

from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from billhook.recovery.masks import masked_gradients, project_, trained_masks


class MaskCallback(TrainerCallback):
    """Keeps the prunable weights that are zero when training begins zero: `Trainer(..., callbacks=[MaskCallback()])`.

    Gradients are masked when they are accumulated, before they are clipped, and weights are projected after each
    optimizer step. Raises BillhookError when training begins if no trained weight is zero.
    """

    def __init__(self) -> None:
        self._masks: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the masks, and mask gradients from now on."""
        self._hooks.close()  # of a run that ended with an error
        self._masks = trained_masks(kwargs["model"])
        self._hooks.enter_context(masked_gradients(kwargs["model"], self._masks))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project the weights after a step."""
        project_(kwargs["model"], self._masks)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop masking gradients."""
        self._hooks.close()
