"""Matrices as SVG: heat maps with a cell for every number, and the mask of a layer as an image."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from statistics import quantiles

from billhook.reports.charts import LETTER, RIGHT, TOP, WIDTH, axes, margin, svg
from billhook.reports.scales import Axis, Scale, drawable, number, scale

_SMALL = 0.82  # size of the numbers in cells
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[int],
    values: Sequence[Sequence[float | None]],
    axis: Axis,
    *,
    x: str,
    summary: str = "",
    standalone: bool = False,
) -> str:
    """`values` [rows, columns] as coloured cells, with numbers where there is room; None is an empty cell.

    `axis` is that of the colours, `x` the label of the columns. Values far from all others do not stretch the colours;
    the label counts them.
    """
    left, right = 14 + LETTER * max(map(len, rows)), WIDTH - RIGHT
    width, height = (right - left) / len(columns), min(24.0, max(3.0, 220 / len(rows)))
    bottom = TOP + height * len(rows)
    drawn = [v for line in values for v in line if v is not None and drawable(v, axis.log)]
    usual = drawn if axis.log else _without_outliers(drawn)
    colours = scale(usual, axis, left, right)
    numbers = height >= 13 and width >= _SMALL * LETTER * max((len(f"{v:.3g}") for v in drawn), default=0) + 2
    parts = []
    for i, (row, line) in enumerate(zip(rows, values, strict=True)):
        y = TOP + i * height
        if i % math.ceil(11 / height) == 0:
            place = f'x="{left - 6:.1f}" y="{y + height / 2 + 4:.1f}"'
            parts.append(f'<text {place} text-anchor="end">{escape(row)}</text>')
        for j, value in enumerate(line):
            if value is not None:
                tooltip = f"{row}, {columns[j]}: {number(value)}"
                parts += _cell((left + j * width, y, width, height), value, colours, tooltip, numbers)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * width >= 24)
    for j, column in enumerate(columns):
        if j % every == 0:
            place = f'x="{left + (j + 0.5) * width:.1f}" y="{bottom + 15:.0f}"'
            parts.append(f'<text {place} text-anchor="middle">{column}</text>')
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{bottom + 31:.0f}" text-anchor="middle">{escape(x)}</text>')
    beyond = f", {len(drawn) - len(usual)} beyond" if len(usual) < len(drawn) else ""
    parts += _colour_bar(colours, axis.label + beyond, bottom + 44)
    return svg(title, parts, bottom + 92, summary=summary, standalone=standalone)


def _without_outliers(values: Sequence[float]) -> Sequence[float]:
    """The values within three times the range of the middle half of it (Tukey's outer fences)."""
    if len(values) < 4:
        return values
    low, _, high = quantiles(values, n=4, method="inclusive")
    reach = 3 * (high - low)
    return [v for v in values if low - reach <= v <= high + reach] if reach else values


def by_kind(
    kinds: Sequence[str], blocks: Sequence[int], values: Sequence[float | None]
) -> tuple[list[str], list[int], list[list[float | None]]]:
    """Rows, columns and values of a heat map by kind and block: means over the layers of each pair."""
    rows, columns = list(dict.fromkeys(kinds)), sorted(set(blocks))
    found: dict[tuple[str, int], list[float]] = {}
    for kind, block, value in zip(kinds, blocks, values, strict=True):
        if value is not None:
            found.setdefault((kind, block), []).append(value)
    means = {place: sum(several) / len(several) for place, several in found.items()}
    return rows, columns, [[means.get((kind, block)) for block in columns] for kind in rows]


def _cell(
    box: tuple[float, float, float, float], value: float, colours: Scale, tooltip: str, numbers: bool
) -> list[str]:
    x, y, width, height = box
    at = colours(max(value, colours.low)) if colours.log else colours(value)
    red, green, blue = _colour((at - colours.start) / (colours.stop - colours.start))
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width + 0.2:.1f}" height="{height + 0.2:.1f}"'
    cell = f'<rect {place} fill="rgb({red},{green},{blue})"><title>{escape(tooltip)}</title></rect>'
    if not numbers:
        return [cell]
    ink = "#000" if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else "#fff"
    place = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle"'
    return [cell, f'<text {place} style="fill:{ink};font-size:{_SMALL}em">{value:.3g}</text>']


def _colour(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    k = min(int(place), len(_RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (place - k)) for a, b in zip(_RAMP[k], _RAMP[k + 1], strict=True))
    return red, green, blue


def _colour_bar(colours: Scale, label: str, top: float) -> list[str]:
    """The colour scale with its numbers."""
    width, parts = (colours.stop - colours.start) / 64, []
    for k in range(64):
        red, green, blue = _colour((k + 0.5) / 64)
        place = f'x="{colours.start + k * width:.1f}" y="{top:.0f}" width="{width + 0.3:.1f}" height="10"'
        parts.append(f'<rect {place} fill="rgb({red},{green},{blue})"/>')
    end = -math.inf
    for tick in colours.ticks:
        if colours(tick) - (half := LETTER * len(number(tick)) / 2) < end + 4:
            continue  # no room
        end = colours(tick) + half
        parts.append(f'<text x="{colours(tick):.1f}" y="{top + 24:.0f}" text-anchor="middle">{number(tick)}</text>')
    place = f'x="{(colours.start + colours.stop) / 2:.0f}" y="{top + 40:.0f}" text-anchor="middle"'
    return [*parts, f"<text {place}>{escape(label)}</text>"]


def mask(
    title: str, tiles: Sequence[bytes], shape: tuple[int, int], *, summary: str = "", standalone: bool = False
) -> str:
    """The mask of a weight of `shape` [out, in] as an image, white where weights are kept.

    `tiles` are rows of equal tiles of the weight, one byte each: from 0, all removed, to 255, all kept.
    """
    y = scale([0, shape[0]], Axis("", whole=True), TOP, 300)
    x = scale([0, shape[1]], Axis("", whole=True), margin(y.ticks), WIDTH - RIGHT)
    place = f'x="{x.start:.1f}" y="{y.start:.0f}" width="{x.stop - x.start:.1f}" height="{y.stop - y.start:.0f}"'
    look = 'preserveAspectRatio="none" style="image-rendering:pixelated"'
    image = f'<image {place} {look} href="data:image/png;base64,{_png(tiles)}"/>'
    parts = [*axes(x, y, Axis("input (column)"), Axis("output (row)")), image]
    return svg(title, parts, 340, summary=summary, standalone=standalone)


def _png(lines: Sequence[bytes]) -> str:
    """A grey image of one byte per pixel, as PNG in base64."""
    head = struct.pack(">2I5B", len(lines[0]), len(lines), 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line for line in lines), 9)
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    packed = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(packed)).decode()
