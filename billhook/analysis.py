"""ATP's error explosion: how the error of each block's output grows with depth, for several plans.

Huang et al. 2025, arXiv:2502.14770: errors made in early blocks are carried on and amplified by later ones. Here the
model is pruned by each plan, block by block, and the hidden states after every block are compared with those of the
dense model on windows that were not used for calibration: ||Y - Y_dense||^2 / ||Y_dense||^2. It says nothing about what
an error does to the prediction.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import find_blocks
from billhook.engine.walk import evaluating
from billhook.errors import BillhookError
from billhook.plan.plan import SparsityPlan, load_plan
from billhook.reports.charts import Axis, Series, chart
from billhook.steps.options import split_options
from billhook.steps.request import Opened, Request, open_request
from billhook.store.files import write_text
from billhook.trials.heldout import split_windows
from billhook.trials.trials import Setting, TrialRunner

VERSION = 1
WINDOWS = 8  # held-out windows compared: their hidden states after every block are in memory at once


def analyze(
    model: str | Path | PreTrainedModel,
    plans: Mapping[str, str | Path | SparsityPlan],
    *,
    progress: Callable[[str], None] = lambda plan: None,
    begin: Callable[[Opened, Setting, list[float]], None] = lambda opened, setting, targets: None,
    **fields: Any,
) -> dict[str, Any]:
    """Return, for each of `plans` (name -> plan or file), the relative error after every block and the sparsity of
    every block.

    Keyword arguments are fields of `Request` (calibration, criterion, options, samples, length, ...). The model's
    weights are as before afterwards. `begin` is called with the model, how it is pruned and the plans' sparsities
    before anything is pruned. Raises BillhookError where there is no plan, or one does not fit the model.
    """
    if not plans:
        raise BillhookError("Say which plans to compare: --plan plan.json, several times if you like.")
    loaded = {name: plan if isinstance(plan, SparsityPlan) else load_plan(plan) for name, plan in plans.items()}
    request = Request(model, **({"samples": 2 * WINDOWS} | fields))
    options, _ = split_options(request.options, request.criterion, ())
    opened = open_request(request, True, "An analysis")
    shapes = {layer.name: layer.shape for layer in opened.layers}
    for plan in loaded.values():
        plan.check(shapes)
    assert opened.calibration is not None
    split = split_windows(opened.calibration, len(opened.batches[0]), request.seed)
    setting = Setting(request.criterion, options, request.group)
    begin(opened, setting, [plan.target for plan in loaded.values()])
    ids = split.heldout[:WINDOWS]
    found = {}
    with TrialRunner(opened.model, opened.layers, split.batches, ids, setting) as runner:
        dense = block_outputs(opened.model, ids)
        for name, plan in loaded.items():
            runner.prune(plan)
            errors = [relative_error(y, x) for y, x in zip(block_outputs(opened.model, ids), dense, strict=True)]
            found[name] = {"target": plan.target, "relative_error": errors, "sparsity": _by_block(plan, opened.layers)}
            progress(name)
    facts = {"model": opened.facts, "criterion": request.criterion, "criterion_options": options}
    return {"version": VERSION, **facts, "windows": len(ids), "calibration": split.facts, "plans": found}


def draw(analysis: Mapping[str, Any], path: Path) -> None:
    """Write the picture, error by block for every plan, as SVG."""
    plans = analysis["plans"].items()
    series = [
        Series(f"{name} ({p['target']:g})", range(len(p["relative_error"])), p["relative_error"]) for name, p in plans
    ]
    title = f"How errors grow with depth after pruning with {analysis['criterion']}: lower is better"
    y = Axis("squared error of the block's output over its square", log=True)
    words = "One line for each plan, with its sparsity."
    write_text(
        path, chart(title, series, Axis("block, from the input (0)", whole=True), y, summary=words, standalone=True)
    )


@torch.no_grad()
def block_outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The hidden states after every block, float32 [windows, length, width], for ids int64 [windows, length]."""
    _, blocks = find_blocks(model)
    outputs: list[list[Tensor]] = [[] for _ in blocks]

    def note(index: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, result: Any) -> None:
            outputs[index].append((result[0] if isinstance(result, tuple) else result).float())

        return hook

    handles = [block.register_forward_hook(note(index)) for index, block in enumerate(blocks)]
    try:
        with evaluating(model):
            for window in ids:
                model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in outputs]


def relative_error(y: Tensor, dense: Tensor) -> float:
    """The squared difference of two tensors of any one shape, as a share of the square of `dense`."""
    return float((y - dense).square().sum(dtype=torch.float64) / dense.square().sum(dtype=torch.float64))


def _by_block(plan: SparsityPlan, layers: Any) -> list[float]:
    """The parameter-weighted mean sparsity of every block that has layers to prune, in depth order."""
    sums: dict[int, list[float]] = {}
    for layer in layers:
        n = layer.shape[0] * layer.shape[1]
        removed, total = sums.setdefault(layer.block, [0.0, 0.0])
        sums[layer.block] = [removed + n * plan.sparsity[layer.name], total + n]
    return [removed / total for removed, total in sums.values()]
