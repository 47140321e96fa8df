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
    "compare": "billhook.comparing",
    "evaluate": "billhook.perplexity",
    "find_layers": "billhook.arch",
    "load": "billhook.runtime.loading",
    "load_calibration": "billhook.data",
    "load_model": "billhook.checkpoint",
    "load_plan": "billhook.plan",
    "load_windows": "billhook.data",
    "measure": "billhook.measuring",
    "pack": "billhook.runtime.packing",
    "prune": "billhook.job",
    "prune_": "billhook.pruning",
    "save_pruned": "billhook.save",
    "search": "billhook.searching",
    "unpack": "billhook.runtime.unpacking",
    "verify": "billhook.verification",
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
