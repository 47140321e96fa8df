"""Charts as SVG: lines and points over two axes. Needs no other package.

A chart is one string. Its colours come from the style sheet `STYLE`, which follows the reader's light or dark mode;
`standalone` includes the sheet in the SVG. Lines have different markers, and the colours of Okabe & Ito for all kinds
of colour vision. Points show their numbers as tooltips. The same numbers give the same bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
RIGHT, TOP, _BOTTOM = 12, 12, 40
LETTER = 6.3  # mean width of a letter
_LABEL = 24  # letters of the longest name that is written next to its line
_LINE = 13  # height of a line of text
COLOURS = 8
_LIGHT = ("#0072b2", "#b35c00", "#00795a", "#c23b00", "#a34d86", "#3a7ca5", "#1b1b1b", "#766800")
_DARK = ("#5ab4f0", "#f5b041", "#3fd0a4", "#ff8a57", "#eba0cc", "#9ad8fa", "#f2f2f2", "#e6d55a")


def _sheet(colours: Sequence[str], ink: str, grid: str) -> str:
    series = "".join(f".bh-s{i}{{color:{colour}}}" for i, colour in enumerate(colours))
    chart = f".bh-chart{{color:{ink}}}.bh-chart text{{fill:{ink}}}.bh-grid{{stroke:{grid}}}"
    return f"{chart}.bh-chart .bh-hollow{{fill:none}}{series}"


STYLE = (
    ".bh-chart{font:11px system-ui,sans-serif}"
    + _sheet(_LIGHT, "#333", "#ddd")
    + f"@media (prefers-color-scheme:dark){{{_sheet(_DARK, '#ddd', '#444')}}}"
    + f"@media print{{{_sheet(_LIGHT, '#333', '#ddd')}}}"
)


@dataclass(frozen=True)
class Series:
    """Points by x; a y of None is a gap, `low` and `high` bound a band, and `labels` are tooltips.

    `hollow` points are drawn as outlines. Without `line` they are not connected, without `marks` only the line is
    drawn. A series without a name is not in the legend.
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
    """A label with its unit; `log` for a logarithmic scale, `whole` for whole numbers only, `zero` to begin at zero.

    A linear axis spans at least `span`, or 2 % of the largest value, so that rounding errors do not fill the chart.
    """

    label: str
    log: bool = False
    whole: bool = False
    zero: bool = False
    span: float = 0.0


@dataclass(frozen=True)
class Scale:
    """A map from values in [low, high] to coordinates in [start, stop], with the values to mark."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: Sequence[float]

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (v - a) / (b - a) * (self.stop - self.start)


def chart(
    title: str, series: Sequence[Series], x: Axis, y: Axis, *, summary: str = "", standalone: bool = False
) -> str:
    """Lines and points as SVG; `title` and `summary` are the description for screen readers.

    Points that are not finite, or not positive on a logarithmic axis, are left out. Lines that end at the same x are
    labelled there if the names are short, otherwise in a legend below.
    """
    values = [v for s in series for v in (*s.y, *s.low, *s.high) if v is not None and drawable(v, y.log)]
    ys = scale(values, y, HEIGHT - _BOTTOM, TOP)
    named = [(i, s) for i, s in enumerate(series) if s.name]
    ends = _ends([s for _, s in named], ys)
    right = RIGHT + (24 + LETTER * max(len(s.name) for _, s in named) if ends else 0)
    xs = scale([v for s in series for v in s.x if drawable(v, x.log)], x, margin(ys.ticks), WIDTH - right)
    legend, extra = _legend(named, ends, xs)
    body = [*axes(xs, ys, x, y), *(part for i, s in enumerate(series) for part in _series(s, i, xs, ys)), *legend]
    return svg(title, body, HEIGHT + extra, summary=summary, standalone=standalone)


def svg(title: str, body: Sequence[str], height: float, *, summary: str = "", standalone: bool = False) -> str:
    """An SVG of elements; a standalone one shows its title."""
    label = escape(f"{title}. {summary}".strip(), quote=True)
    head = f'class="bh-chart" role="img" aria-label="{label}"'
    if not standalone:
        return f'<svg {head} viewBox="0 0 {WIDTH} {height:.0f}">{"".join(body)}</svg>\n'
    name = f'<text x="0" y="-8" font-weight="600">{escape(title)}</text>'
    wide = max(WIDTH, LETTER * 1.05 * len(title))
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="-6 -26 {wide + 12:.0f} {height + 32:.0f}"'
    return f"<svg {box} {head}><style>{STYLE}</style>{name}{''.join(body)}</svg>\n"


def number(value: float) -> str:
    """A number with four significant digits and no trailing zeros."""
    text = f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def margin(ticks: Sequence[float]) -> float:
    """The width of an axis' label and the numbers at its ticks."""
    return 30 + LETTER * max(len(number(tick)) for tick in ticks)


def scale(values: Sequence[float], axis: Axis, start: float, stop: float) -> Scale:
    """The scale of an axis over `values`; a linear axis of fractional numbers ends at ticks."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if axis.log:
        low, high = (low, high) if high > low * 1.05 else (low / 1.5, high * 1.5)
        return Scale(low, high, start, stop, True, _log_ticks(low, high))
    low = 0.0 if axis.zero else low
    least = axis.span or 0.02 * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = (0.0, least) if axis.zero else ((low + high - least) / 2, (low + high + least) / 2)
    step = _step((high - low) / 5, axis.whole)
    if not axis.whole:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Scale(low, high, start, stop, False, _ticks(low, high, step))


def _step(rough: float, whole: bool) -> float:
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    return max(1.0, round(step)) if whole else step


def _ticks(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-6)
    return [(first + i) * step for i in range(math.floor(high / step + 1e-6) - first + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with multiples if there are few, or even steps on a shorter axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**d for d in decades for m in parts if low <= m * 10.0**d * 1.0001 <= high * 1.0002]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return _ticks(low, high, _step((high - low) / 6, False))


def axes(xs: Scale, ys: Scale, x: Axis, y: Axis) -> list[str]:
    """Grid lines, numbers and labels; the y axis runs from `ys.start` at the bottom to `ys.stop`, or from the top."""
    top, bottom, parts = min(ys.start, ys.stop), max(ys.start, ys.stop), []
    for tick in ys.ticks:
        at = ys(tick)
        parts.append(f'<line class="bh-grid" x1="{xs.start:.1f}" x2="{xs.stop:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{xs.start - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in xs.ticks:
        at = xs(tick)
        parts.append(f'<line class="bh-grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.0f}" y2="{bottom:.0f}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15:.0f}" text-anchor="middle">{number(tick)}</text>')
    place = f'x="{(xs.start + xs.stop) / 2:.0f}" y="{bottom + 34:.0f}"'
    parts.append(f'<text {place} text-anchor="middle">{escape(x.label)}</text>')
    turned = f'transform="translate(11 {(top + bottom) / 2:.0f}) rotate(-90)"'
    return [*parts, f'<text {turned} text-anchor="middle">{escape(y.label)}</text>']


def _series(series: Series, index: int, xs: Scale, ys: Scale) -> list[str]:
    shape, parts = _MARKS[index % len(_MARKS)], [f'<g class="bh-s{index % COLOURS}">']
    if series.low:
        ring = [*zip(series.x, series.high, strict=True), *reversed(list(zip(series.x, series.low, strict=True)))]
        points = " ".join(f"{xs(a):.1f},{ys(b):.1f}" for a, b in ring if drawable(a, xs.log) and drawable(b, ys.log))
        parts.append(f'<polygon points="{points}" fill="currentColor" fill-opacity="0.15"/>')
    shown = _shown(series, xs.log, ys.log)
    if series.line and len(shown) > 1:
        path = " ".join(f"{xs(a):.1f},{ys(b):.1f}" for _, a, b in shown)
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.6"{dash}/>')
    for k, a, b in shown if series.marks else []:
        hollow = ' class="bh-hollow" stroke="currentColor" stroke-width="1.5"'
        kind = hollow if series.hollow and series.hollow[k] else ' fill="currentColor"'
        text = series.labels[k] if series.labels else f"{series.name}: {number(a)}, {number(b)}"
        parts.append(f'<path d="{shape(xs(a), ys(b))}"{kind}><title>{escape(text)}</title></path>')
    return [*parts, "</g>"]


def _shown(series: Series, log_x: bool, log_y: bool) -> list[tuple[int, float, float]]:
    """The points that can be drawn, with their positions in the series."""
    points = enumerate(zip(series.x, series.y, strict=True))
    return [(k, a, b) for k, (a, b) in points if b is not None and drawable(a, log_x) and drawable(b, log_y)]


def drawable(value: float, log: bool) -> bool:
    """Whether a value has a place on an axis."""
    return math.isfinite(value) and (value > 0 or not log)


def _ends(series: Sequence[Series], ys: Scale) -> list[float]:
    """The heights of names next to the ends of lines, at least a line of text apart; empty for a legend."""
    last = [shown[-1] for s in series if (shown := _shown(s, False, ys.log))]
    fits = all(len(s.name) <= _LABEL for s in series) and _LINE * len(series) <= HEIGHT - TOP - _BOTTOM
    if len(series) < 2 or len(last) < len(series) or len({x for _, x, _ in last}) > 1 or not fits:
        return []
    places = [ys(y) for _, _, y in last]
    order = sorted(range(len(places)), key=places.__getitem__)
    at = -math.inf
    for k in order:
        at = places[k] = max(places[k], at + _LINE)
    at = math.inf
    for k in reversed(order):
        at = places[k] = min(places[k], at - _LINE, HEIGHT - _BOTTOM)
    return places


def _legend(named: Sequence[tuple[int, Series]], ends: Sequence[float], xs: Scale) -> tuple[list[str], int]:
    """The names of the series, at the `ends` of the lines or below the chart, and the additional height."""
    if ends:
        return [part for (i, s), at in zip(named, ends, strict=True) for part in _entry(s, i, xs.stop + 6, at)], 0
    if len(named) < 2:
        return [], 0
    parts, left, line = [], 54.0, 0
    for index, entry in named:
        width = 22 + LETTER * len(entry.name)
        if left > 54 and left + width > WIDTH:
            left, line = 54.0, line + 1
        parts += _entry(entry, index, left, HEIGHT + 10 + 16 * line)
        left += width + 8
    return parts, 16 * (line + 1) + 6


def _entry(series: Series, index: int, left: float, at: float) -> list[str]:
    dash = ' stroke-dasharray="4 3"' if series.dashed else ""
    ends = f'x1="{left:.0f}" x2="{left + 14:.0f}" y1="{at:.1f}" y2="{at:.1f}"'
    stroke = f'<line {ends} stroke="currentColor" stroke-width="1.6"{dash}/>' if series.line else ""
    mark = f'<path d="{_MARKS[index % len(_MARKS)](left + 7, at)}" fill="currentColor"/>' if series.marks else ""
    name = f'<text x="{left + 18:.0f}" y="{at + 4:.1f}">{escape(series.name)}</text>'
    return [f'<g class="bh-s{index % COLOURS}">{stroke}{mark}</g>', name]


def _polygon(*corners: tuple[float, float]) -> Callable[[float, float], str]:
    def draw(x: float, y: float) -> str:
        return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners) + "Z"

    return draw


def _circle(x: float, y: float) -> str:
    return f"M{x - 3:.1f} {y:.1f}a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z"


_MARKS: tuple[Callable[[float, float], str], ...] = (
    _circle,
    _polygon((-2.8, -2.8), (2.8, -2.8), (2.8, 2.8), (-2.8, 2.8)),
    _polygon((0, -3.8), (3.4, 2.4), (-3.4, 2.4)),
    _polygon((0, -3.8), (3.8, 0), (0, 3.8), (-3.8, 0)),
    _polygon((0, 3.8), (3.4, -2.4), (-3.4, -2.4)),
    _polygon((-4, 0), (-1, -1), (0, -4), (1, -1), (4, 0), (1, 1), (0, 4), (-1, 1)),
)
