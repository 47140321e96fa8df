"""Quantizers: round a weight to the code points of a grid.

A quantizer is a function `(W, stats, grid, *, options) -> Quantized`; see `billhook.methods.quantize.grid`.
"""

from billhook.registry import Registry

QUANTIZERS = Registry(
    "quantizer",
    {
        "gptq": "billhook.methods.quantize.gptq:gptq",
        "round": "billhook.methods.quantize.nearest:nearest",
    },
    plugins=True,
)
