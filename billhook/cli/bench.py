"""`billhook bench`: decode and prefill speed, memory and file size of models, side by side."""

from collections.abc import Sequence
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
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    prompt: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "16,128,512",
    new: Annotated[int, typer.Option(help="Tokens to generate after each prompt.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one warm-up round.", min=1)] = 3,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw speed-up against sparsity (SVG); needs at least two packed models and --against.", metavar="FILE"
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
    from billhook.store.files import check_writable, write_text

    if picture is not None:
        check_writable(picture)
        if against is None or len(models) < 2:
            raise BillhookError("--picture needs --against DENSE and at least two packed models.")
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
        drawn = draw(sides)
        if drawn is None:
            raise BillhookError("--picture needs at least two packed models: a dense one has no sparsity to draw.")
        write_text(picture, drawn)
        say(f"{picture}: speed-up against sparsity.")
    if as_json:
        facts = {"against": None if against is None else sides[0].name, "new": new, "rounds": rounds}
        emit({**facts, "models": [asdict(x) for x in sides], "hardware": benchmark.hardware(device)})
        return
    show(sides)


def _numbers(text: str, option: str) -> list[int]:
    from billhook.errors import BillhookError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise BillhookError(f"{option} {text}: write whole numbers with commas, such as 1,8.") from None


def draw(sides: "Sequence[Side]") -> str | None:
    """Decode speed-up against sparsity as SVG, a line for each batch size and prompt length; None for fewer than two
    models that have both."""
    from billhook.reports.charts import Axis, Series, chart

    packed = sorted((side for side in sides if side.sparsity is not None), key=lambda side: side.sparsity or 0.0)
    series = []
    for number, cell in enumerate(packed[0].cells if packed else []):
        found = [(100 * (side.sparsity or 0.0), side.cells[number].decode_speedup) for side in packed]
        points = [(x, ratio) for x, ratio in found if ratio is not None]
        bands = ([r.median for _, r in points], [r.low for _, r in points], [r.high for _, r in points])
        labels = [f"{x:.1f} % sparsity: {r.median:.2f}x" for x, r in points]
        name = f"batch {cell.batch}, prompt {cell.prompt}"
        series.append(Series(name, [x for x, _ in points], *bands, labels=labels))
    if not series or len(series[0].x) < 2:
        return None
    dense = Series("dense", [series[0].x[0], series[0].x[-1]], [1.0, 1.0], marks=False, dashed=True)
    return chart(
        "Tokens generated per second, packed against dense",
        [*series, dense],
        Axis("sparsity of packed layers (%)"),
        Axis("speed-up over the dense model", zero=True),
        summary="Bands: quartiles over the rounds.",
        standalone=True,
    )


def show(sides: "Sequence[Side]") -> None:
    """Print one row per model, then one row per model, batch size and prompt length."""
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
    header = ["model", "batch", "prompt", "prefill tokens/s", "speed-up", "decode tokens/s", "speed-up"]
    table("Speed: median (quartiles)", header, rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _speed(spread: "Spread") -> str:
    return f"{spread.median:,.1f} ({spread.low:,.1f}-{spread.high:,.1f})"


def _ratio(spread: "Spread | None") -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"
