"""Billhook prunes large language models layer by layer, with as little loss as possible.

`import billhook` loads neither torch nor transformers: the public names below are imported when they are first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ALLOCATORS": "billhook.allocators",
    "BillhookError": "billhook.errors",
    "CRITERIA": "billhook.criteria",
    "JobError": "billhook.errors",
    "METRICS": "billhook.metrics",
    "Pattern": "billhook.plan",
    "Report": "billhook.job",
    "SparsityPlan": "billhook.plan",
    "Table": "billhook.table",
    "allocate": "billhook.allocators",
    "analyze": "billhook.analysis",
    "compare": "billhook.comparison.grid",
    "evaluate": "billhook.evaluation.perplexity",
    "find_layers": "billhook.arch",
    "load": "billhook.packed.loading",
    "load_calibration": "billhook.text.windows",
    "load_model": "billhook.disk.checkpoint",
    "load_plan": "billhook.plan",
    "load_windows": "billhook.text.windows",
    "measure": "billhook.measuring.measure",
    "pack": "billhook.packed.packing",
    "prune": "billhook.job",
    "prune_": "billhook.pruning",
    "save_pruned": "billhook.run.save",
    "search": "billhook.searching.search",
    "unpack": "billhook.packed.unpacking",
    "verify": "billhook.verification",
    "write_windows": "billhook.writing",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'billhook' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
