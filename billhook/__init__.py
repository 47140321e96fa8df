"""Billhook prunes large language models layer by layer, with as little loss as possible.

`import billhook` loads neither torch nor transformers: the public names below are imported when they are first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ALLOCATORS": "billhook.plan.allocators",
    "BillhookError": "billhook.errors",
    "CRITERIA": "billhook.methods.sparse",
    "JobError": "billhook.errors",
    "METRICS": "billhook.measurement",
    "Pattern": "billhook.plan.spec",
    "Plan": "billhook.plan.plan",
    "Report": "billhook.steps.prune",
    "Spec": "billhook.plan.spec",
    "Table": "billhook.plan.table",
    "allocate": "billhook.plan.allocators",
    "compare": "billhook.comparison.grid",
    "evaluate": "billhook.evaluation.perplexity",
    "find_layers": "billhook.architectures.layers",
    "load": "billhook.packed.loading",
    "load_calibration": "billhook.text.windows",
    "load_model": "billhook.tasks.opening",
    "load_plan": "billhook.plan.plan",
    "load_windows": "billhook.text.windows",
    "measure": "billhook.measurement.measure",
    "pack": "billhook.steps.pack",
    "prune": "billhook.steps.prune",
    "prune_": "billhook.steps.apply",
    "save_pruned": "billhook.store.directory",
    "search": "billhook.steps.search",
    "unpack": "billhook.steps.pack",
    "verify": "billhook.steps.verify",
}

_REMOVED = {
    "SparsityPlan": "billhook.Plan",
    "analyze": "billhook.compare, whose cells have the error of each block's output",
    "write_windows": 'calibration="self:"',
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _REMOVED:
        raise AttributeError(f"billhook.{name} was removed: use {_REMOVED[name]}.")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'billhook' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
