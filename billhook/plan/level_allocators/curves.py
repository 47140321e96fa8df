"""Curves for levels: the storage types with the smallest sum of measured losses.

    minimize Σ_l c_l · e_l(v_l)   subject to   Σ_l bytes_l(v_l) ≤ budget

e_l(v) is the measured relative error of layer l's output at type v, c_l the KL divergence of the model per relative
error. `billhook compress` takes c_l = ½ f_l · mean ‖W x‖² with the Fisher information f_l of the layer's output, which
one backward pass through the dense model gives: the mean of g², g being the gradient of the log-probability of tokens
drawn from the model's own predictions. The minimum is found exactly, by dynamic programming over the bytes. Tensors
that are tied get one type.

Limits: c_l is that of small errors, one layer at a time; errors of several layers add to each other or cancel.
"""

from billhook.plan.knapsack import choose_levels
from billhook.plan.levels import Levels, Types
from billhook.registry import method


@method(paper="Billhook", needs=("level_errors", "level_weights"))
def curves(levels: Levels) -> Types:
    """Return the types with the least summed loss."""
    menus = [levels.menu(group) for group in levels.groups]
    costs = [[levels.bytes(g, t) for t in menu] for g, menu in zip(levels.groups, menus, strict=True)]
    losses = [[levels.loss(g, t) for t in menu] for g, menu in zip(levels.groups, menus, strict=True)]
    chosen = choose_levels(costs, losses, levels.budget)
    return {name: menu[k] for g, menu, k in zip(levels.groups, menus, chosen, strict=True) for name in g}
