"""`billhook plan`: from a table to a plan. Arithmetic only, without torch: a sweep over options takes seconds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.cli.common import emit, parse_settings, say, table
from billhook.cli.options import Json, Pattern, Preset, Settings, Sparsity, output_option

NAME = "plan"
EXAMPLES = """\b
Examples:
  billhook plan table.json --allocator alphapruning --sparsity 0.7 -o plan.json
  billhook plan table.json --allocator atp --sparsity 0.6 --set beta=0.02 -o plan.json
  billhook plan table.json --allocator owl --pattern 4:8
  billhook plan table.json --preset alphapruning/llama-2-7b@70 -o plan.json
"""
ALLOCATOR_HELP = "See billhook ls allocators; alphapruning unless a preset is given."


def command(
    table_file: Annotated[Path, typer.Argument(metavar="TABLE", help="A table.json from billhook measure.")],
    *,
    allocator: Annotated[str | None, typer.Option(help=ALLOCATOR_HELP)] = None,
    sparsity: Sparsity = None,
    pattern: Pattern = "unstructured",
    settings: Settings = None,
    preset: Preset = None,
    output: Annotated[Path | None, output_option("The plan.json to write; otherwise the plan is shown.")] = None,
    as_json: Json = False,
) -> None:
    """Decide the sparsity of each layer and write plan.json."""
    from billhook.plan.allocators import allocate, presets
    from billhook.plan.table import Table

    chosen, given = allocator or "alphapruning", dict[str, Any](parse_settings(settings))
    if preset is not None:
        chosen, sparsity, given = presets.apply(preset, allocator, sparsity, given)
    measured = Table.load(table_file)
    plan = allocate(measured, sparsity, allocator=chosen, pattern=pattern, **given)
    if output is not None:
        plan.save(output)
    values = list(plan.sparsity.values())
    say(f"{chosen}: sparsity {plan.target:g} over {len(values)} layers, from {min(values):.4f} to {max(values):.4f}.")
    options = ", ".join(f"{k}={v}" for k, v in plan.made_by["options"].items()) or "none"
    say(f"Options: {options}." + (f" Written to {output}." if output else ""))
    if as_json:
        emit(plan.to_json())
    elif output is None:
        rows = []
        for block, layers in measured.blocks().items():
            mean = sum(plan.sparsity[x.layer] * x.n for x in layers) / sum(x.n for x in layers)
            inside = " ".join(f"{x.kind.rpartition('.')[2]}={plan.sparsity[x.layer]:.3f}" for x in layers[:8])
            rows.append([str(block), f"{mean:.4f}", inside])
        table("Sparsity by block", ["block", "mean", "layers"], rows)
