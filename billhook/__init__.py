"""Billhook makes trained models smaller: prunes, quantizes, slims and recovers them, with as little loss as possible.

`import billhook` loads neither torch nor transformers: the public names below are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names below, for type checkers
    from billhook.architectures.layers import find_layers as find_layers
    from billhook.comparison.grid import compare as compare
    from billhook.errors import BillhookError as BillhookError
    from billhook.errors import JobError as JobError
    from billhook.evaluation.perplexity import evaluate as evaluate
    from billhook.measurement import METRICS as METRICS
    from billhook.measurement.measure import measure as measure
    from billhook.methods.sparse import CRITERIA as CRITERIA
    from billhook.packed.loading import load as load
    from billhook.plan.allocators import ALLOCATORS as ALLOCATORS
    from billhook.plan.allocators import allocate as allocate
    from billhook.plan.plan import Plan as Plan
    from billhook.plan.plan import load_plan as load_plan
    from billhook.plan.spec import Pattern as Pattern
    from billhook.plan.spec import Spec as Spec
    from billhook.plan.table import Table as Table
    from billhook.recovery.callback import MaskCallback as MaskCallback
    from billhook.recovery.lora import masked_lora as masked_lora
    from billhook.recovery.lora import merge_masked as merge_masked
    from billhook.recovery.masks import keep_masks as keep_masks
    from billhook.steps.apply import prune_ as prune_
    from billhook.steps.compress_units import compress as compress
    from billhook.steps.pack import pack as pack
    from billhook.steps.pack import unpack as unpack
    from billhook.steps.prune import Report as Report
    from billhook.steps.prune import prune as prune
    from billhook.steps.quantize import quantize as quantize
    from billhook.steps.recover import recover as recover
    from billhook.steps.search import search as search
    from billhook.steps.slim import slim as slim
    from billhook.steps.verify import verify as verify
    from billhook.store.directory import save_pruned as save_pruned
    from billhook.tasks.opening import load_model as load_model
    from billhook.text.windows import load_calibration as load_calibration
    from billhook.text.windows import load_windows as load_windows

__version__ = "0.1.0"

_PUBLIC = {
    "ALLOCATORS": "billhook.plan.allocators",
    "BillhookError": "billhook.errors",
    "CRITERIA": "billhook.methods.sparse",
    "JobError": "billhook.errors",
    "METRICS": "billhook.measurement",
    "MaskCallback": "billhook.recovery.callback",
    "Pattern": "billhook.plan.spec",
    "Plan": "billhook.plan.plan",
    "Report": "billhook.steps.prune",
    "Spec": "billhook.plan.spec",
    "Table": "billhook.plan.table",
    "allocate": "billhook.plan.allocators",
    "compare": "billhook.comparison.grid",
    "compress": "billhook.steps.compress_units",
    "evaluate": "billhook.evaluation.perplexity",
    "find_layers": "billhook.architectures.layers",
    "keep_masks": "billhook.recovery.masks",
    "load": "billhook.packed.loading",
    "load_calibration": "billhook.text.windows",
    "load_model": "billhook.tasks.opening",
    "load_plan": "billhook.plan.plan",
    "load_windows": "billhook.text.windows",
    "masked_lora": "billhook.recovery.lora",
    "measure": "billhook.measurement.measure",
    "merge_masked": "billhook.recovery.lora",
    "pack": "billhook.steps.pack",
    "prune": "billhook.steps.prune",
    "prune_": "billhook.steps.apply",
    "quantize": "billhook.steps.quantize",
    "recover": "billhook.steps.recover",
    "save_pruned": "billhook.store.directory",
    "search": "billhook.steps.search",
    "slim": "billhook.steps.slim",
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
