"""ER (Erdős–Rényi): layers with few weights relative to their inputs and outputs stay denser.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science" (SET), 2018, arXiv:1707.04780, as used in Evci et al., "Rigging the Lottery" (RigL), ICML 2020,
arXiv:1911.11134.

    density_l = c · (in + out) / (in · out),   c such that the mean density is 1 − S

Layers whose density would exceed 1 stay dense, and c is computed again for the others.

Limits: it knows only shapes. Blocks of equal shapes get equal sparsities; only the kinds of layers differ.
"""

from billhook.plan.table import Table
from billhook.registry import method


@method(paper="Mocanu et al. 2018, arXiv:1707.04780")
def er(table: Table, target: float) -> dict[str, float]:
    """Return s_l = 1 - density_l."""
    share = {row.layer: sum(row.shape) / row.n for row in table}
    n = {row.layer: row.n for row in table}
    dense: set[str] = set()
    while True:
        rest = [name for name in n if name not in dense]
        kept = (1 - target) * table.total - sum(n[name] for name in dense)
        factor = kept / sum(n[name] * share[name] for name in rest) if rest else 0.0
        full = {name for name in rest if factor * share[name] > 1}
        if not full:
            return {name: 0.0 if name in dense or target == 0 else 1 - factor * share[name] for name in n}
        dense |= full
