"""Gradient: the second term of GBLM's score alone.

An ablation of Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", 2023,
arXiv:2311.04902. The weights of one output row are compared with each other.

    score_ij = |W_ij| · ‖G_ij‖_p

G_ij are the gradients of `gblm`. With a file of gradients (`--gradients`) it needs no calibration text. Kept weights
are not updated. An expert whose gradients are all zero is pruned by magnitude, which is noted in the record.

Limits: it does not look at activations.
"""

from typing import Literal

from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats, gradient_name
from billhook.registry import method


@method(paper="Das et al. 2023, arXiv:2311.04902", needs=lambda norm: (gradient_name(norm, "paper"),), group="row")
def gradient(W: Tensor, stats: LayerStats, select: Select, *, norm: Literal["l1", "l2"] = "l1") -> Tensor:
    """Return W [out, in] with zeros at the smallest scores; reads stats.gradient [out, in]."""
    assert stats.gradient is not None
    return W.masked_fill(~select(W.abs() * stats.gradient), 0)
