"""Criteria: which weights of a layer to remove, one small file each.

A criterion is a pure function `(W, stats, select, *, options) -> W'`. W is the layer's weight, float32 [out, in], and
is not changed; `stats` is the layer's `billhook.stats.LayerStats` with the statistics named in `needs`; `select(score)
-> keep` is a `billhook.masks.Select`, which knows how many weights must go and which compete with each other. The
result has zeros where weights were removed. Adding a criterion is one file and one line here; the contract tests then
run on it.
"""

from billhook.registry import Registry

CRITERIA = Registry(
    "criterion",
    {
        "magnitude": "billhook.criteria.magnitude:magnitude",
        "wanda": "billhook.criteria.wanda:wanda",
        "gblm": "billhook.criteria.gblm:gblm",
        "ria": "billhook.criteria.ria:ria",
        "dsnot": "billhook.criteria.dsnot:dsnot",
        "wandapp": "billhook.criteria.wandapp:wandapp",
        "gradient": "billhook.criteria.gradient:gradient",
        "pruner_zero": "billhook.criteria.pruner_zero:pruner_zero",
        "sparsegpt": "billhook.criteria.sparsegpt:sparsegpt",
        "admm": "billhook.criteria.admm:admm",
    },
)
