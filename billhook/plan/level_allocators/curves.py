"""Curves for levels: the storage types with the smallest sum of measured losses.

    minimize Σ_l c_l · e_l(v_l)   subject to   Σ_l bytes_l(v_l) ≤ budget

e_l(v) is the measured relative error of layer l's output at type v, c_l the KL divergence of the model per relative
error, measured where all layers are quantized; both as in `levels`. The minimum is found exactly, by dynamic
programming over the bytes. Tensors that are tied get one type.

Limits: it does not know how the weights c_l change when the types do; `billhook compress` measures them again under the
types found.
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
