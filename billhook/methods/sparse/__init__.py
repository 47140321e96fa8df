"""Criteria: which weights of a layer to remove, one small file each.

A criterion is a pure function `(W, stats, select, *, options) -> W'`. W is the layer's weight, float32 [out, in], and
is not changed; `stats` is the layer's `billhook.methods.statistics.LayerStats` with the statistics named in `needs`;
`select(score) -> keep` is a `billhook.methods.masks.Select`, which knows how many weights must go and which compete
with each other. The result has zeros where weights were removed. Adding a criterion is one file and one line here; the
contract tests then run on it.
"""

from billhook.registry import Registry

CRITERIA = Registry(
    "criterion",
    {
        "magnitude": "billhook.methods.sparse.magnitude:magnitude",
        "wanda": "billhook.methods.sparse.wanda:wanda",
        "gblm": "billhook.methods.sparse.gblm:gblm",
        "ria": "billhook.methods.sparse.ria:ria",
        "dsnot": "billhook.methods.sparse.dsnot:dsnot",
        "wandapp": "billhook.methods.sparse.wandapp:wandapp",
        "gradient": "billhook.methods.sparse.gradient:gradient",
        "pruner_zero": "billhook.methods.sparse.pruner_zero:pruner_zero",
        "sparsegpt": "billhook.methods.sparse.sparsegpt:sparsegpt",
        "admm": "billhook.methods.sparse.admm:admm",
    },
    plugins=True,
)
