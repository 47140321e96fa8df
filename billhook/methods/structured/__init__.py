"""Which parts of a unit to remove: MLP channels, groups of heads, one small file for each method.

A method is a pure function `(W, stats, groups, count, *, options) -> (keep, W')`. W is the weight of the unit's
consumer (the down or output projection), float32 [out, in], and is not changed; `stats` is the layer's
`billhook.methods.statistics.LayerStats` with the statistics named in `needs`; `groups` int64 [parts, size] are the
columns of W that each part feeds, no column twice; `count` parts are kept. `keep` is bool [parts], and W' is zero in
the columns of removed parts. Adding a method is one file and one line here; the contract tests then run on it.
"""

from billhook.registry import Registry

STRUCTURED = Registry(
    "structured method",
    {
        "obs": "billhook.methods.structured.obs:obs",
        "wanda_sp": "billhook.methods.structured.wanda_sp:wanda_sp",
        "taylor": "billhook.methods.structured.taylor:taylor",
        "magnitude": "billhook.methods.structured.magnitude:magnitude",
    },
)
