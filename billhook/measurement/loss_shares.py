"""What each layer's errors cost the model when all layers are pruned alike: the column `loss_share`.

The model is pruned to `MIDDLE`, every layer alike, block by block as `billhook prune` does; of the divergence of its
predictions from the dense model's, one backward pass tells each layer's share (`billhook.trials.attribution`),
interactions included. The criterion sees all windows but the last `WINDOWS` (at most half of them), which are scored.
Holds a second copy of the weights while it works.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import in_batches
from billhook.errors import BillhookError
from billhook.measurement.error_curves import cheaper
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators.curves import MIDDLE
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.registry import method
from billhook.trials.trials import Bench, Setting

WINDOWS = 16


@method(paper=fact("loss_share").paper)
def loss_share(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Sequence[Tensor], *, criterion: str = "admm"
) -> dict[str, float]:
    """Nats a token by layer name; the model's weights are as before afterwards.

    `batches` are token ids [batch, length] int64. Raises BillhookError for fewer than two windows.
    """
    ids = torch.cat(list(batches))
    if len(ids) < 2:
        raise BillhookError(
            "The metric loss_share needs two windows of text or more: give more --samples, or a smaller --length."
        )
    last = min(WINDOWS, len(ids) // 2)
    plan = Plan.of_sparsities(MIDDLE, Pattern.parse("unstructured"), {layer.name: MIDDLE for layer in layers}, {})
    setting = Setting(criterion, CRITERIA.configure(criterion, cheaper(criterion, layers)))
    with Bench(model, layers, in_batches(ids[:-last], len(batches[0])), ids[-last:], setting) as bench:
        bench.prune(plan)
        return bench.attribute()[1]
