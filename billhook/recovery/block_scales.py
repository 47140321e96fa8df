"""Tune the scales of a quantized block, and its norms and biases, for the outputs of the model behind it.

With `--recipe best`, after the layers of a block are quantized: codes and the small integers of super-blocks stay, and
the 16-bit scales and minima move with the block's norms and biases. Loss, held-out windows and schedule are those of
`billhook.recovery.blockwise`; the rate is 2 % of the root mean square of a layer's scales. EfficientQAT (Chen et al.
2024, arXiv:2407.11062) trains scales by the error of the block's own output; here it is that of the next block.

Limits: layers that are slices of one tensor, such as experts, keep the scales that they have.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.batch import Batch
from billhook.engine.resources import Resources
from billhook.engine.walk import Block
from billhook.methods.encoded import Encoded
from billhook.methods.quantize.grid import Quantized
from billhook.recovery.blockwise import BlockTuner, Refine, kept_in
from billhook.recovery.trained import Scaled, Trained, free_parts

RATE = 0.02


class ScaleTuner(BlockTuner):
    """A tuner for a walk that quantizes; `made` is called with each quantized layer, and `changed` with the layers of a
    block after its tuning."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        resources: Resources,
        seed: int,
        changed: Callable[[Layer, Quantized], None],
    ) -> None:
        super().__init__(Refine(rate=RATE, tune_norms_and_biases=True, seed=seed), model, batches, resources)
        self._changed = changed
        self._made: dict[str, Quantized] = {}
        self._scaled: dict[str, Scaled] = {}

    def made(self, layer: Layer, weight: Encoded) -> None:
        """Note a layer of the current block."""
        assert isinstance(weight, Quantized)
        self._made[layer.name] = weight

    def tuned(self, block: Block) -> Sequence[Trained]:
        """The scales of its layers, and its parameters of one dimension."""
        matrices = Counter(id(layer.stored) for layer in block.layers)
        self._scaled = {
            layer.name: Scaled(layer.name, stored, weight, layer.view)
            for layer in block.layers
            if isinstance(stored := layer.stored, nn.Parameter) and matrices[id(stored)] == 1
            if free_parts(weight := self._made[layer.name])
        }
        return [*self._scaled.values(), *kept_in(block.module, [], True)]

    def tune_(self, block: Block) -> str:
        """Tune the block in place, hand over its layers, and return a note."""
        note = super().tune_(block)
        for layer in block.layers:
            if (scaled := self._scaled.get(layer.name)) is not None:
                weight = scaled.weight
                weight.check(layer.weight)
                self._changed(layer, weight)
        self._made, self._scaled = {}, {}
        return note
