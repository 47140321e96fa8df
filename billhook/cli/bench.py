"""`billhook bench`: decode and prefill speed, memory and file size of models, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from billhook.cli.common import Device, Dtype, Json, TrustRemoteCode, emit, handle_errors, progress, say, table

if TYPE_CHECKING:
    from billhook.packed.benchmark import Side, Spread

NAME = "bench"
EXAMPLES = """\b
Examples:
  billhook bench ./packed --against ./pruned
  billhook bench ./packed-50 ./packed-60 ./packed-70 --against ./dense --batch 1 --prompt 128 --picture speed.svg
"""


@handle_errors
def command(
    models: Annotated[list[str], typer.Argument(help="Model directories, dense or packed.", metavar="MODEL...")],
    *,
    against: Annotated[str | None, typer.Option(help="The dense model to compare with.", metavar="DENSE")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    prompt: Annotated[str, typer.Option(help="Prompt lengths in tokens, with commas.")] = "16,128,512",
    new: Annotated[int, typer.Option(help="Tokens to make after each prompt.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Counted rounds; one more warms up.", min=1)] = 3,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw speed-up against sparsity (SVG); two packed models at least, and --against.", metavar="FILE"
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure models in turns, each in its own process; medians and quartiles."""
    from dataclasses import asdict

    from billhook.errors import BillhookError
    from billhook.packed import benchmark
    from billhook.packed.machine import hardware
    from billhook.runtime.library import path
    from billhook.store.files import check_writable, write_text

    if picture is not None:
        check_writable(picture)
        if against is None or len(models) < 2:
            raise BillhookError(
                "A picture of speed-up against sparsity needs --against DENSE and at least two packed models."
            )
    batches, prompts = _numbers(batch, "--batch"), _numbers(prompt, "--prompt")
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    total = (rounds + 1) * len(batches) * len(prompts) * (len(models) + (against is not None))
    with progress("measuring", total=total) as advance:
        sides = benchmark.bench(
            models,
            against=against,
            batches=batches,
            prompts=prompts,
            new=new,
            rounds=rounds,
            options=options,
            progress=advance,
        )
    if picture is not None:
        drawn = benchmark.picture(sides)
        if drawn is None:
            raise BillhookError(
                "Fewer than two of the models are packed: there is no sparsity to draw the speed-up against."
            )
        write_text(picture, drawn)
        say(f"{picture}: speed-up against sparsity.")
    if as_json:
        found = {
            "against": None if against is None else sides[0].name,
            "new": new,
            "rounds": rounds,
            "models": [asdict(x) for x in sides],
        }
        emit({**found, "hardware": {**hardware(device), "kernels": str(path())}})
        return
    show(sides)


def _numbers(text: str, option: str) -> list[int]:
    from billhook.errors import BillhookError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise BillhookError(f"{option} {text}: write whole numbers with commas, such as 1,8.") from None


def show(sides: "list[Side]") -> None:
    """Print one row a model, then one row a model, batch size and prompt length."""
    facts = [
        [
            s.name,
            "-" if s.sparsity is None else f"{s.sparsity:.1%}",
            _mib(s.file_bytes),
            _mib(s.memory_bytes),
            f"{s.load_s:.1f}",
        ]
        for s in sides
    ]
    table("Models", ["model", "sparsity", "file MiB", "peak memory MiB", "load s"], facts)
    rows = [
        [
            s.name,
            str(c.batch),
            str(c.prompt),
            _speed(c.prefill),
            _ratio(c.prefill_speedup),
            _speed(c.decode),
            _ratio(c.decode_speedup),
        ]
        for s in sides
        for c in s.cells
    ]
    header = ["model", "batch", "prompt", "prefill tokens/s", "times dense", "decode tokens/s", "times dense"]
    table("Speed: median (quartiles)", header, rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _speed(spread: "Spread") -> str:
    return f"{spread.median:,.1f} ({spread.low:,.1f}-{spread.high:,.1f})"


def _ratio(spread: "Spread | None") -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"
