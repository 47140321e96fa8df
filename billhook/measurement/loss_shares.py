"""Loss shares: how much of the model's divergence is due to each layer when all layers are pruned alike.

    loss_share:CRITERION = ½ ⟨∂D/∂V_l, V_l − W_l⟩

D is the divergence of the model's predictions from the dense model's after every layer was pruned to 60 % with the
criterion, block by block as in `billhook prune`; V_l and W_l are the pruned and dense weights of layer l. One backward
pass gives all shares. D is zero and smallest at the dense weights; where it is quadratic, the shares add up to it
(Euler's theorem), and each contains half of what the layer's error costs together with those of other layers. On our
models they add up to 1.1 to 1.3 times D. It is read by `curves`.

Cost: one pruning of the model in memory and a second copy of its weights. The criterion sees all calibration windows
but the last 16 (at most half), which are scored.
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
from billhook.plan.plan import Pattern, SparsityPlan
from billhook.registry import method
from billhook.trials.trials import Setting, TrialRunner

WINDOWS = 16


@method(paper=fact("loss_share").paper)
def loss_share(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Sequence[Tensor], *, criterion: str = "admm"
) -> dict[str, float]:
    """Return each layer's share of the divergence, in nats per token, by layer name; the model's weights are restored.

    `batches` are token ids [batch, length] int64. Raises BillhookError for fewer than two windows.
    """
    ids = torch.cat(list(batches))
    if len(ids) < 2:
        raise BillhookError(
            "The metric loss_share needs two windows of text or more: give more --samples, or a smaller --length."
        )
    last = min(WINDOWS, len(ids) // 2)
    plan = SparsityPlan(MIDDLE, Pattern.parse("unstructured"), {layer.name: MIDDLE for layer in layers}, {})
    setting = Setting(criterion, CRITERIA.configure(criterion, cheaper(criterion, layers)))
    with TrialRunner(model, layers, in_batches(ids[:-last], len(batches[0])), ids[-last:], setting) as runner:
        runner.prune(plan)
        return runner.attribute()
