"""Pictures: lines, points and bands over two axes as SVG, drawn by hand so that they need no package and no network.

One picture is one string. It takes its colours from the style sheet `STYLE`, light or dark as the reader's screen is;
`standalone` puts that sheet inside for a file of its own. Colours are those of Okabe & Ito, which people with any kind
of colour vision can tell apart, and series also differ in their markers. Every point carries its numbers as a tooltip.
The same numbers give the same bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 12, 40
_LETTER = 6.3  # width of a letter of the legend
COLOURS = 8
_LIGHT = ("#0072b2", "#b35c00", "#00795a", "#c23b00", "#a34d86", "#3a7ca5", "#1b1b1b", "#766800")
_DARK = ("#5ab4f0", "#f5b041", "#3fd0a4", "#ff8a57", "#eba0cc", "#9ad8fa", "#f2f2f2", "#e6d55a")


def _sheet(colours: Sequence[str], ink: str, grid: str) -> str:
    series = "".join(f".bh-s{i}{{color:{colour}}}" for i, colour in enumerate(colours))
    return (
        f".bh-chart{{color:{ink}}}.bh-chart text{{fill:{ink}}}.bh-grid{{stroke:{grid}}}.bh-chart "
        f".bh-hollow{{fill:none}}{series}"
    )


STYLE = (
    ".bh-chart{font:11px system-ui,sans-serif}"
    + _sheet(_LIGHT, "#333", "#ddd")
    + f"@media (prefers-color-scheme:dark){{{_sheet(_DARK, '#ddd', '#444')}}}"
    + f"@media print{{{_sheet(_LIGHT, '#333', '#ddd')}}}"
)


@dataclass(frozen=True)
class Series:
    """Points of one kind, by x; a y of None is a gap. `low` and `high` are a band around them, `hollow` marks single
    points.

    `line` False leaves the points unconnected, `marks` False leaves the points out, `dashed` breaks the line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    hollow: Sequence[bool] = ()
    labels: Sequence[str] = ()
    line: bool = True
    marks: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A label with its unit; `log` for a logarithmic scale, `whole` for ticks at whole numbers, `zero` to begin at
    zero."""

    label: str
    log: bool = False
    whole: bool = False
    zero: bool = False


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (v - a) / (b - a) * (self.stop - self.start)


def chart(
    title: str, series: Sequence[Series], x: Axis, y: Axis, *, summary: str = "", standalone: bool = False
) -> str:
    """The picture as SVG; `title` and `summary` are what a screen reader says of it.

    Points whose value is not finite, or not positive on a logarithmic axis, are left out.
    """
    xs = _scale([v for s in series for v in s.x if _drawn(v, x.log)], x, _LEFT, WIDTH - _RIGHT)
    values = [v for s in series for v in (*s.y, *s.low, *s.high) if v is not None and _drawn(v, y.log)]
    ys = _scale(values, y, HEIGHT - _BOTTOM, _TOP)
    legend, extra = _legend([s for s in series if s.name])
    body = [*_axes(xs, ys, x, y), *(part for i, s in enumerate(series) for part in _series(s, i, xs, ys)), *legend]
    style = f"<style>{STYLE}</style>" if standalone else ""
    space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    label = escape(f"{title}. {summary}".strip(), quote=True)
    head = f'<svg{space} class="bh-chart" viewBox="0 0 {WIDTH} {HEIGHT + extra}" role="img" aria-label="{label}">'
    name = f'<text x="0" y="-8" font-weight="600">{escape(title)}</text>' if standalone else ""
    if standalone:
        head = head.replace(
            f'viewBox="0 0 {WIDTH} {HEIGHT + extra}"', f'viewBox="-6 -26 {WIDTH + 12} {HEIGHT + extra + 32}"'
        )
    return f"{head}{style}{name}{''.join(body)}</svg>\n"


def number(value: float) -> str:
    """A number as a person writes it: four figures, no needless zeros."""
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"


def _scale(values: Sequence[float], axis: Axis, start: float, stop: float) -> _Scale:
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if axis.log:
        low, high = (low, high) if high > low * 1.05 else (low / 1.5, high * 1.5)
        ticks = _log_ticks(low, high)
        return _Scale(low, high, start, stop, True, ticks)
    low = 0.0 if axis.zero else low
    if high <= low:
        low, high = low - 0.5, low + 0.5
    step = _step((high - low) / 5, axis.whole)
    if axis.whole:
        first = math.ceil(low / step)
    else:
        first, low, high = math.floor(low / step), math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    return _Scale(
        low, high, start, stop, False, [(first + i) * step for i in range(int((high - first * step) / step + 1e-6) + 1)]
    )


def _step(rough: float, whole: bool) -> float:
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    return max(1.0, round(step)) if whole else step


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [
            m * 10.0**d for d in decades for m in parts if low <= m * 10.0**d * 1.0001 and m * 10.0**d <= high * 1.0001
        ]
        if len(ticks) >= 3:
            break
    return ticks if len(ticks) >= 2 else [low, high]


def _axes(xs: _Scale, ys: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom, parts = HEIGHT - _BOTTOM, []
    for tick in ys.ticks:
        at = ys(tick)
        parts.append(f'<line class="bh-grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in xs.ticks:
        at = xs(tick)
        parts.append(f'<line class="bh-grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{number(tick)}</text>')
    parts.append(
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>'
    )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'
    )
    return parts


def _series(series: Series, index: int, xs: _Scale, ys: _Scale) -> list[str]:
    shape, parts = _MARKS[index % len(_MARKS)], [f'<g class="bh-s{index % COLOURS}">']
    if series.low:
        ring = [*zip(series.x, series.high, strict=True), *reversed(list(zip(series.x, series.low, strict=True)))]
        points = " ".join(f"{xs(a):.1f},{ys(b):.1f}" for a, b in ring if _drawn(a, xs.log) and _drawn(b, ys.log))
        parts.append(f'<polygon points="{points}" fill="currentColor" fill-opacity="0.15"/>')
    places = enumerate(zip(series.x, series.y, strict=True))
    shown = [(k, a, b) for k, (a, b) in places if b is not None and _drawn(a, xs.log) and _drawn(b, ys.log)]
    if series.line and len(shown) > 1:
        path = " ".join(f"{xs(a):.1f},{ys(b):.1f}" for _, a, b in shown)
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.6"{dash}/>')
    for k, a, b in shown if series.marks else []:
        kind = (
            ' class="bh-hollow" stroke="currentColor" stroke-width="1.5"'
            if series.hollow and series.hollow[k]
            else ' fill="currentColor"'
        )
        told = series.labels[k] if series.labels else f"{series.name}: {number(a)}, {number(b)}"
        parts.append(f'<path d="{shape(xs(a), ys(b))}"{kind}><title>{escape(told)}</title></path>')
    return [*parts, "</g>"]


def _drawn(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _legend(series: Sequence[Series]) -> tuple[list[str], int]:
    """The names below the picture, as many on a line as fit, and the height they take."""
    if len(series) < 2:
        return [], 0
    parts, left, line = [], float(_LEFT), 0
    for index, entry in enumerate(series):
        width = 22 + _LETTER * len(entry.name)
        if left > _LEFT and left + width > WIDTH:
            left, line = float(_LEFT), line + 1
        at = HEIGHT + 10 + 16 * line
        dash = ' stroke-dasharray="4 3"' if entry.dashed else ""
        ends = f'x1="{left:.0f}" x2="{left + 14:.0f}" y1="{at}" y2="{at}"'
        stroke = f'<line {ends} stroke="currentColor" stroke-width="1.6"{dash}/>'
        mark = f'<path d="{_MARKS[index % len(_MARKS)](left + 7, at)}" fill="currentColor"/>' if entry.marks else ""
        parts.append(f'<g class="bh-s{index % COLOURS}">{stroke if entry.line else ""}{mark}</g>')
        parts.append(f'<text x="{left + 18:.0f}" y="{at + 4}">{escape(entry.name)}</text>')
        left += width + 8
    return parts, 16 * (line + 1) + 6


def _polygon(corners: Sequence[tuple[float, float]]) -> Callable[[float, float], str]:
    def draw(x: float, y: float) -> str:
        return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners) + "Z"

    return draw


def _circle(x: float, y: float) -> str:
    return f"M{x - 3:.1f} {y:.1f}a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z"


_MARKS: tuple[Callable[[float, float], str], ...] = (
    _circle,
    _polygon([(-2.8, -2.8), (2.8, -2.8), (2.8, 2.8), (-2.8, 2.8)]),
    _polygon([(0, -3.8), (3.4, 2.4), (-3.4, 2.4)]),
    _polygon([(0, -3.8), (3.8, 0), (0, 3.8), (-3.8, 0)]),
    _polygon([(0, 3.8), (3.4, -2.4), (-3.4, -2.4)]),
    _polygon(
        [(-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1)]
    ),
)
