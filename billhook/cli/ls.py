"""`billhook ls`: the methods there are, from the registries."""

from typing import Annotated, Any

import typer

from billhook.cli.common import emit, table
from billhook.cli.options import Json
from billhook.errors import BillhookError
from billhook.plan.allocators import AUTO, RCO
from billhook.registry import Registry, hint

NAME = "ls"
EXAMPLES = """\b
Examples:
  billhook ls
  billhook ls allocators
  billhook ls criteria --json
"""
KINDS = (
    "recipes",
    "allocators",
    "criteria",
    "quantizers",
    "level-allocators",
    "structured",
    "objectives",
    "types",
    "metrics",
    "families",
)
AUTO_PAPER = "Billhook: allocations tried on held-out text"
RCO_PAPER = "RCO 2026, arXiv:2605.00649; options as of level-allocators"  # which torch would have to be loaded for


def command(
    kind: Annotated[str | None, typer.Argument(help=f"{', '.join(KINDS)}; all of them if left out.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """List names, options with their defaults, and the paper each comes from."""
    if kind not in (*KINDS, None):
        raise BillhookError(f"Unknown kind {kind!r}.{hint(str(kind), KINDS)} There are: {', '.join(KINDS)}.")
    found = {each: _rows(each) for each in (KINDS if kind is None else (kind,))}
    if as_json:
        return emit(found)
    for each, rows in found.items():
        header = list(rows[0])
        table(each, header, [[_text(row[name]) for name in header] for row in rows], numeric_from=len(header))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={default}" for key, default in value.items()) or "-"
    return "-" if value is None else str(value)


def _rows(kind: str) -> list[dict[str, Any]]:
    if kind == "families":
        from billhook.architectures.families import FAMILIES

        return [{"model_type": name, "task": task} for task, names in FAMILIES.items() for name in names]
    if kind == "metrics":
        from billhook.plan.metrics import CURVES, FACTS

        signs = {name: "larger" if m.sign == 1 else "smaller" for name, m in FACTS.items()}
        metrics = (*FACTS.values(), *CURVES.values())
        signed = [({"name": m.name, "more sparsity where": signs.get(m.name, "a curve")}, m) for m in metrics]
        return [{**row, "summary": m.summary, "paper": m.paper} for row, m in signed]
    if kind == "types":
        from billhook.methods.quantize.ggml import GGML
        from billhook.plan.storage import bits, block

        names = [*(f"int{b}/64" for b in range(8, 1, -1)), *sorted(GGML, key=bits, reverse=True)]
        files = {True: "GGUF", False: "compressed-tensors"}
        return [{"name": n, "bits": bits(n), "columns": block(n), "in files of": files[n in GGML]} for n in names]
    if kind == "recipes":
        from billhook.plan.recipes import RECIPES

        fields = ("criterion", "allocator", "options", "refine", "sparsity", "source")
        return [{"name": name, **{key: getattr(x, key) for key in fields}} for name, x in RECIPES.items()]
    if kind == "level-allocators":
        from billhook.plan.level_allocators import LEVEL_ALLOCATORS
        from billhook.racing.allocators import MODEL_ALLOCATORS

        rows = [*_methods(LEVEL_ALLOCATORS), *_methods(MODEL_ALLOCATORS)]
        others = {AUTO: AUTO_PAPER, "like:FILE.gguf": "the types of that file, tensor by tensor"}
        return [*rows, *({"name": name, "options": {}, "paper": paper} for name, paper in others.items())]
    registry = _registry(kind)
    rows = _methods(registry)
    on_model = {RCO: RCO_PAPER, AUTO: AUTO_PAPER} if kind == "allocators" else {}
    return [*rows, *({"name": name, "options": {}, "paper": paper} for name, paper in on_model.items())]


def _methods(registry: Registry) -> list[dict[str, Any]]:
    options = {name: {o.name: o.default for o in registry.options(name).values()} for name in registry.names()}
    return [{"name": name, "options": found, "paper": registry.paper(name)} for name, found in options.items()]


def _registry(kind: str) -> Registry:
    if kind == "allocators":
        from billhook.plan.allocators import ALLOCATORS

        return ALLOCATORS
    from billhook.methods.quantize import QUANTIZERS
    from billhook.methods.sparse import CRITERIA
    from billhook.methods.structured import STRUCTURED
    from billhook.recovery.objectives import OBJECTIVES

    return {"quantizers": QUANTIZERS, "structured": STRUCTURED, "objectives": OBJECTIVES}.get(kind, CRITERIA)
