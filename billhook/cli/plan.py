"""`billhook plan`: from a table to a plan. Arithmetic only, without torch: a sweep over options takes seconds."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import emit, parse_settings, say, table
from billhook.cli.options import Allocator, Json, Pattern, Recipe, Settings, Sparsity, output_option

NAME = "plan"
EXAMPLES = """\b
Examples:
  billhook plan table.json --allocator alphapruning --sparsity 0.7 -o plan.json
  billhook plan table.json --allocator atp --sparsity 0.6 --set beta=0.02 -o plan.json
  billhook plan table.json --allocator owl --pattern 4:8
  billhook plan table.json --recipe alphapruning/llama-2-7b@70 -o plan.json
"""


def command(
    table_file: Annotated[Path, typer.Argument(metavar="TABLE", help="A table.json from billhook measure.")],
    *,
    allocator: Allocator = None,
    sparsity: Sparsity = None,
    pattern: Pattern = "unstructured",
    settings: Settings = None,
    recipe: Recipe = None,
    output: Annotated[Path | None, output_option("The plan.json to write; otherwise the plan is shown.")] = None,
    as_json: Json = False,
) -> None:
    """Decide the sparsity of each layer and write plan.json."""
    from billhook.errors import BillhookError
    from billhook.plan.allocators import allocate
    from billhook.plan.recipes import chosen
    from billhook.plan.spec import Pattern as Parsed
    from billhook.plan.table import Table
    from billhook.store.files import check_new_file

    if allocator is None and recipe is None:
        raise BillhookError("Say how to allocate: --allocator NAME or --recipe NAME (billhook ls shows all).")
    way = chosen(recipe or "", "", allocator or "", "", structured=Parsed.parse(pattern).structured)
    options = {**way.options, **parse_settings(settings)}
    measured, target = Table.load(table_file), way.sparsity if sparsity is None else sparsity
    plan = allocate(measured, target, allocator=way.allocator, pattern=pattern, **options)
    if output is not None:
        check_new_file(output, table_file)
        plan.save(output)
    values = list(plan.sparsity.values())
    spread = f"from {min(values):.4f} to {max(values):.4f}"
    say(f"{way.allocator}: sparsity {plan.target:g} over {len(values)} layers, {spread}.")
    used = ", ".join(f"{k}={v}" for k, v in plan.made_by["options"].items()) or "none"
    say(f"Options: {used}." + (f" Written to {output}." if output else ""))
    if as_json:
        emit(plan.to_json())
    elif output is None:
        rows = []
        for block, layers in measured.blocks().items():
            mean = sum(plan.sparsity[x.layer] * x.n for x in layers) / sum(x.n for x in layers)
            inside = " ".join(f"{x.kind.rpartition('.')[2]}={plan.sparsity[x.layer]:.3f}" for x in layers[:8])
            rows.append([str(block), f"{mean:.4f}", inside])
        table("Sparsity by block", ["block", "mean", "layers"], rows)
