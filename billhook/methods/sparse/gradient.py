"""Gradient times magnitude: the second term of GBLM-Pruner's score alone.

Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", arXiv:2311.04902, an
ablation: score
|W_ij| * ||G_ij||_p, compared within each output row, G_ij being the gradients of the loss of each calibration sequence.
It does not look at activations. Kept weights are not updated.
"""

from typing import Literal

from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats, gradient_name
from billhook.registry import method


@method(paper="Das et al. 2023, arXiv:2311.04902", needs=lambda norm: (gradient_name(norm, "paper"),), group="row")
def gradient(W: Tensor, stats: LayerStats, select: Select, *, norm: Literal["l1", "l2"] = "l1") -> Tensor:
    """Return W [out, in] with zeros at the smallest |W_ij| * ||G_ij||_p; reads stats.gradient [out, in]."""
    assert stats.gradient is not None
    return W.masked_fill(~select(W.abs() * stats.gradient), 0)
