"""`billhook write`: calibration text that the model writes itself, as a file for every command that reads text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import Device, Dtype, Json, Seed, TrustRemoteCode, emit, handle_errors, progress, say
from billhook.cli.groups import Text, grouped

NAME = "write"
EXAMPLES = """\b
Examples:
  billhook write ./model --windows 128 --length 512 -o own.safetensors
  billhook write ./model --windows 96 --calibration text.txt --samples 32 --length 512 -o both.safetensors
  billhook prune ./model --criterion admm --sparsity 0.6 --calibration both.safetensors --output ./pruned
"""


@handle_errors
@grouped
def command(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the hub.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file of tokens to write.")],
    windows: Annotated[int, typer.Option(help="Windows that the model writes.", min=1)] = 128,
    text: Text,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Let the model write calibration text, after the windows of --calibration if there is one.

    It helps what is fitted to text (admm, --allocator auto, --refine) where there is little of it, and stands in for
    text where there is none.
    """
    from billhook.errors import BillhookError
    from billhook.steps.request import Request
    from billhook.store.files import check_writable
    from billhook.tasks.self_text import make_text, open_task

    if output.suffix != ".safetensors":
        raise BillhookError(f"{output}: a file of tokens is read by its name, which must end in .safetensors.")
    check_writable(output)
    request = Request(
        model=model, **vars(text), seed=seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    task = open_task(request, windows)
    with progress("positions", task.positions) as advance:
        made = make_text(task, output, advance)
    beside = f"{made.samples} windows of {made.source} and " if made.samples else ""
    total = made.samples + made.windows
    more = f" Read all of them with --samples {total}." if total > Request.samples else ""
    say(f"{output}: {beside}{made.windows} windows of {made.length} tokens that the model wrote.{more}")
    if as_json:
        emit({"output": str(output), **asdict(made)})
