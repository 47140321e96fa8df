"""How far predictions are from those of the dense model: KL divergence for predictions, cosine for embeddings.

    KL(p || q) in nats, p of the dense model          (`billhook.evaluation.kl`)
    1 - cos(e, e')        e of the model, e' of the dense model

Both are zero, their minimum, for equal predictions, and quadratic near it, which is what shares of layers
(`billhook.trials.attribution`) and races of plans rest on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from billhook.evaluation.kl import TopKTeacher, WindowKl, kl_grad, token_kl, window_kl


@dataclass(frozen=True)
class Divergence:
    """`teacher(outputs)` is what is kept of the dense model's outputs [n, classes]; `compare(outputs, teacher)` gives
    the mean over n, the number of equal top-1 predictions and each divergence; `gradient` is that of the sum.

    `each(outputs, teacher)` is the divergence of each, [n], which autograd can differentiate; the teacher may be the
    dense model's outputs themselves.
    """

    name: str
    teacher: Callable[[Tensor], Any]
    each: Callable[[Tensor, Any], Tensor]
    compare: Callable[[Tensor, Any], WindowKl]
    gradient: Callable[[Tensor, Any], Tensor]


def _unit(outputs: Tensor) -> Tensor:
    return functional.normalize(outputs.detach().float(), dim=-1)


def _distances(outputs: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of outputs [n, width]."""
    return 1 - functional.cosine_similarity(outputs.float(), teacher.detach().float(), dim=-1)


def _distance(outputs: Tensor, teacher: Tensor) -> WindowKl:
    """There are no predictions that could agree."""
    distances = 1 - (_unit(outputs) * teacher).sum(-1)
    return WindowKl(float(distances.mean(dtype=torch.float64)), 0, distances.cpu().numpy())


def _distance_grad(outputs: Tensor, teacher: Tensor) -> Tensor:
    leaf = outputs.detach().float().requires_grad_()
    with torch.enable_grad():
        distance = _distances(leaf, teacher).sum()
    return torch.autograd.grad(distance, leaf)[0]


KL = Divergence("KL divergence", TopKTeacher.of, token_kl, window_kl, kl_grad)
COSINE = Divergence("cosine distance", _unit, _distances, _distance, _distance_grad)
