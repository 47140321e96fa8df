"""`billhook bench`: speed, memory and file size of models, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from billhook.cli.common import emit, numbers, progress, say, table
from billhook.cli.options import Json, Loading

if TYPE_CHECKING:
    from billhook.packed.benchmark import Side, Speed, Spread

NAME = "bench"
EXAMPLES = """\b
Examples:
  billhook bench ./packed --against ./pruned
  billhook bench ./packed-50 ./packed-60 ./packed-70 --against ./dense --batch 1 --prompt 128 --picture speed.svg
"""
PROMPT_HELP = (
    "Prompt lengths in tokens, separated by commas; by default those of 16,128,512 that fit the context. Not for "
    "models that read images alone."
)
NEW_HELP = "Tokens to generate after each prompt; by default 64. Not for models that generate nothing."
PICTURE_HELP = "Draw speed-up against sparsity (SVG); needs at least two packed models and --against."


def command(
    models: Annotated[list[str], typer.Argument(help="Model directories, dense or packed.", metavar="MODEL...")],
    *,
    against: Annotated[str | None, typer.Option(help="The dense model to compare with.", metavar="DENSE")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    prompt: Annotated[str | None, typer.Option(help=PROMPT_HELP, metavar="LIST")] = None,
    new: Annotated[int | None, typer.Option(help=NEW_HELP, min=2)] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one warm-up round.", min=1)] = 3,
    picture: Annotated[Path | None, typer.Option(help=PICTURE_HELP, metavar="FILE")] = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Measure models in turn, each in its own process; medians and quartiles.

    Models that generate text do so after random prompts; others read random texts or images.
    """
    from dataclasses import asdict

    from billhook.errors import BillhookError
    from billhook.packed import bench_inputs, benchmark
    from billhook.store.files import check_new_file, write_text
    from billhook.store.layout import is_packed

    if picture is not None:
        check_new_file(picture)
        if against is None or len(models) < 2:
            raise BillhookError("--picture needs --against DENSE and at least two packed models.")
        if sum(is_packed(Path(model)) for model in models) < 2:
            raise BillhookError("--picture needs at least two packed models: a dense one has no sparsity to draw.")
    prompts = None if prompt is None else numbers(prompt, int, "--prompt", "16,128")
    batches = numbers(batch, int, "--batch", "1,8")
    options = loading.fields(models[0], streams=False) | {"dtype": loading.dtype}
    with progress("measuring") as advance:
        sides = benchmark.bench(
            models, against=against, batches=batches, prompts=prompts, new=new, rounds=rounds, options=options,
            progress=advance,
        )  # fmt: skip
    if picture is not None:
        drawn = draw(sides)
        if drawn is None:
            raise BillhookError("--picture needs at least two packed models: a dense one has no sparsity to draw.")
        write_text(picture, drawn)
        say(f"{picture}: speed-up against sparsity.")
    if not as_json:
        return show(sides)
    made = (new or bench_inputs.NEW) if sides[0].cells[0].decode else None
    facts = {"against": None if against is None else sides[0].name, "new": made, "rounds": rounds}
    emit({**facts, "models": [asdict(x) for x in sides], "hardware": benchmark.hardware(options["device"])})


def draw(sides: "Sequence[Side]") -> str | None:
    """Speed-up against sparsity as SVG, of decoding or, of models that generate nothing, of reading; one line per batch
    size and prompt length. None for fewer than two models that have both."""
    from billhook.packed.bench_inputs import Run
    from billhook.reports.charts import Series, chart
    from billhook.reports.scales import Axis

    packed = sorted((side for side in sides if side.sparsity is not None), key=lambda side: side.sparsity or 0.0)
    series = []
    for number, cell in enumerate(packed[0].cells if packed else []):
        found = [(100 * (side.sparsity or 0.0), side.cells[number]) for side in packed]
        ratios = [(x, own.decode_speedup if own.decode else own.prefill_speedup) for x, own in found]
        points = [(x, ratio) for x, ratio in ratios if ratio is not None]
        line = Series(
            str(Run(cell.batch, cell.prompt)), x=[x for x, _ in points], y=[r.median for _, r in points],
            low=[r.low for _, r in points], high=[r.high for _, r in points],
            labels=[f"{x:.1f} % sparsity: {r.median:.2f}x" for x, r in points],
        )  # fmt: skip
        series.append(line)
    if not series or len(series[0].x) < 2:
        return None
    series.append(Series("dense", [series[0].x[0], series[0].x[-1]], [1.0, 1.0], marks=False, colour=-1, dash=1))
    done = "Tokens generated" if cell.decode else f"{_unit(cell).capitalize()} read"
    title = f"{done} per second, packed against dense"
    x, y = Axis("sparsity of packed layers (%)"), Axis("speed-up over the dense model", zero=True)
    return chart(title, series, x, y, summary="Bands: quartiles over the rounds.", standalone=True)


def show(sides: "Sequence[Side]") -> None:
    """Print one row per model, then one row per model, batch size and prompt length."""
    facts = []
    for s in sides:
        sparsity = "-" if s.sparsity is None else f"{s.sparsity:.1%}"
        facts.append([s.name, sparsity, _mib(s.file_bytes), _mib(s.memory_bytes), f"{s.load_s:.1f}"])
    table("Models", ["model", "sparsity", "file MiB", "peak memory MiB", "load s"], facts)
    cell = sides[0].cells[0]
    header = ["model", "batch", "prompt", "prefill tokens/s", "speed-up", "decode tokens/s", "speed-up"]
    if cell.decode is None:
        header = ["model", "batch", *([] if cell.prompt is None else ["prompt"]), f"{_unit(cell)}/s", "speed-up"]
    table("Speed: median (quartiles)", header, [_row(side.name, cell) for side in sides for cell in side.cells])


def _unit(cell: "Speed") -> str:
    """What a model reads."""
    return "images" if cell.prompt is None else "tokens"


def _row(name: str, cell: "Speed") -> list[str]:
    prompt = [] if cell.prompt is None else [f"{cell.prompt}"]
    decode = () if cell.decode is None else _speed(cell.decode, cell.decode_speedup)
    return [name, f"{cell.batch}", *prompt, *_speed(cell.prefill, cell.prefill_speedup), *decode]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _speed(speed: "Spread", ratio: "Spread | None") -> tuple[str, str]:
    times = "-" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
    return f"{speed.median:,.1f} ({speed.low:,.1f}-{speed.high:,.1f})", times
