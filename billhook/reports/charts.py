"""Charts as SVG: lines and points over two axes. Needs no other package.

A chart is one string. Its colours come from the style sheet `STYLE`, which follows the reader's light or dark mode;
`standalone` includes the sheet in the SVG. Lines have different markers, and the colours of Okabe & Ito for all kinds
of colour vision. Points show their numbers as tooltips. The same numbers give the same bytes. Sizes are such that the
text is legible where a picture is as wide as a phone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from billhook.reports.scales import Axis, Scale, drawable, multiples, number, scale

WIDTH, HEIGHT = 420, 280
_SHOWN = 640  # width of a picture of its own, in pixels, where there is room
RIGHT, TOP, _BOTTOM = 12, 12, 40
LETTER = 6.3  # mean width of a letter
_LABEL = 26  # letters of the longest name that is written next to its line
_LINE = 13  # height of a line of text
COLOURS = 8
_LIGHT = ("#0072b2", "#b35c00", "#00795a", "#c23b00", "#a34d86", "#3a7ca5", "#1b1b1b", "#766800")
_DARK = ("#5ab4f0", "#f5b041", "#3fd0a4", "#ff8a57", "#eba0cc", "#9ad8fa", "#f2f2f2", "#e6d55a")


def _sheet(colours: Sequence[str], ink: str, grid: str) -> str:
    series = "".join(f".bh-s{i}{{color:{colour}}}" for i, colour in enumerate(colours))
    chart = f".bh-chart{{color:{ink}}}.bh-chart text{{fill:{ink}}}.bh-grid{{stroke:{grid}}}"
    return f"{chart}.bh-chart .bh-hollow{{fill:none}}.bh-tick,.bh-ring{{stroke:{ink}}}{series}"


STYLE = (
    ".bh-chart{font:11px system-ui,sans-serif}"
    + _sheet(_LIGHT, "#333", "#ddd")
    + f"@media (prefers-color-scheme:dark){{{_sheet(_DARK, '#ddd', '#444')}}}"
    + f"@media print{{{_sheet(_LIGHT, '#333', '#ddd')}}}"
)


@dataclass(frozen=True)
class Series:
    """Points by x; a y of None is a gap, `low` and `high` bound a band, and `labels` are tooltips.

    `hollow` points are drawn as outlines, and the point number `best` in a ring. Without `line` they are not connected,
    without `marks` only the line is drawn. With `bars`, `low` and `high` are error bars. `colour` and `dash` number the
    colours and the kinds of lines; by default each series has a colour of its own, and -1 is that of the text, for a
    line to compare with. A series without a name is not in the legend.
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
    bars: bool = False
    best: int | None = None
    colour: int | None = None
    dash: int = 0


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
    right = RIGHT + (32 + LETTER * max(len(s.name) for _, s in named) if ends else 0)
    places = [v for s in series for v in s.x if drawable(v, x.log)]
    xs = scale(places, x, margin(ys.ticks), WIDTH - right, whole_steps=False)
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
    shown = f'width="{_SHOWN}" viewBox="-6 -26 {wide + 12:.0f} {height + 32:.0f}"'
    box = f'xmlns="http://www.w3.org/2000/svg" {shown}'
    return f"<svg {box} {head}><style>{STYLE}</style>{name}{''.join(body)}</svg>\n"


def margin(ticks: Sequence[float]) -> float:
    """The width of an axis' label and the numbers at its ticks."""
    return 30 + LETTER * max(len(number(tick)) for tick in ticks)


def axes(xs: Scale, ys: Scale, x: Axis, y: Axis) -> list[str]:
    """Grid lines, numbers and labels; the y axis runs from `ys.start` at the bottom to `ys.stop`, or from the top."""
    top, bottom, parts = min(ys.start, ys.stop), max(ys.start, ys.stop), []
    for tick in ys.ticks:
        at = ys(tick)
        parts.append(f'<line class="bh-grid" x1="{xs.start:.1f}" x2="{xs.stop:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{xs.start - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for at in map(ys, multiples(ys.low, ys.high, range(1, 10))) if ys.log else ():
        parts.append(f'<line class="bh-tick" x1="{xs.start - 3:.1f}" x2="{xs.start:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for at in map(xs, multiples(xs.low, xs.high, range(1, 10))) if xs.log else ():
        parts.append(f'<line class="bh-tick" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{bottom + 3:.1f}"/>')
    for tick in xs.ticks:
        at = xs(tick)
        parts.append(f'<line class="bh-grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.0f}" y2="{bottom:.0f}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15:.0f}" text-anchor="middle">{number(tick)}</text>')
    place = f'x="{(xs.start + xs.stop) / 2:.0f}" y="{bottom + 34:.0f}"'
    parts.append(f'<text {place} text-anchor="middle">{escape(x.label)}</text>')
    turned = f'transform="translate(11 {(top + bottom) / 2:.0f}) rotate(-90)"'
    return [*parts, f'<text {turned} text-anchor="middle">{escape(y.label)}</text>']


def _series(series: Series, index: int, xs: Scale, ys: Scale) -> list[str]:
    shape, parts = _shape(series, index), [f"<g{_look(series, index)}>"]
    if series.bars:
        for a, low, high in zip(series.x, series.low, series.high, strict=True):
            if drawable(low, ys.log) and drawable(high, ys.log):
                parts.append(f'<path d="M{xs(a):.1f} {ys(low):.1f}V{ys(high):.1f}" stroke="currentColor"/>')
    elif series.low:
        ring = [*zip(series.x, series.high, strict=True), *reversed(list(zip(series.x, series.low, strict=True)))]
        points = " ".join(f"{xs(a):.1f},{ys(b):.1f}" for a, b in ring if drawable(a, xs.log) and drawable(b, ys.log))
        parts.append(f'<polygon points="{points}" fill="currentColor" fill-opacity="0.15"/>')
    shown = _shown(series, xs.log, ys.log)
    if series.line and len(shown) > 1:
        path = " ".join(f"{xs(a):.1f},{ys(b):.1f}" for _, a, b in shown)
        parts.append(f'<polyline points="{path}" fill="none" stroke="currentColor" {_stroke(series)}/>')
    for k, a, b in shown if series.marks else []:
        hollow = ' class="bh-hollow" stroke="currentColor" stroke-width="1.5"'
        kind = hollow if series.hollow and series.hollow[k] else ' fill="currentColor"'
        text = series.labels[k] if series.labels else f"{series.name}: {number(a)}, {number(b)}"
        parts.append(f'<path d="{shape(xs(a), ys(b))}"{kind}><title>{escape(text)}</title></path>')
        if k == series.best:
            parts.append(f'<circle class="bh-hollow bh-ring" cx="{xs(a):.1f}" cy="{ys(b):.1f}" r="7.5"/>')
    return [*parts, "</g>"]


def _look(series: Series, index: int) -> str:
    """The attribute that gives a series its colour."""
    colour = index if series.colour is None else series.colour
    return "" if colour < 0 else f' class="bh-s{colour % COLOURS}"'


def _shape(series: Series, index: int) -> Callable[[float, float], str]:
    return _MARKS[(index if series.colour is None else series.colour) % len(_MARKS)]


def _stroke(series: Series) -> str:
    """The attributes of a line: its width and kind."""
    return f'stroke-width="1.6" stroke-dasharray="{_DASHES[series.dash % len(_DASHES)]}"'


def _shown(series: Series, log_x: bool, log_y: bool) -> list[tuple[int, float, float]]:
    """The points that can be drawn, with their positions in the series."""
    points = enumerate(zip(series.x, series.y, strict=True))
    return [(k, a, b) for k, (a, b) in points if b is not None and drawable(a, log_x) and drawable(b, log_y)]


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
    parts, left, line = [], 40.0, 0
    for index, entry in named:
        width = 30 + LETTER * len(entry.name)
        if left > 40 and left + width > WIDTH:
            left, line = 40.0, line + 1
        parts += _entry(entry, index, left, HEIGHT + 10 + 16 * line)
        left += width + 8
    return parts, 16 * (line + 1) + 6


def _entry(series: Series, index: int, left: float, at: float) -> list[str]:
    ends = f'x1="{left:.0f}" x2="{left + 22:.0f}" y1="{at:.1f}" y2="{at:.1f}"'
    stroke = f'<line {ends} stroke="currentColor" {_stroke(series)}/>' if series.line else ""
    mark = f'<path d="{_shape(series, index)(left + 11, at)}" fill="currentColor"/>' if series.marks else ""
    name = f'<text x="{left + 26:.0f}" y="{at + 4:.1f}">{escape(series.name)}</text>'
    return [f"<g{_look(series, index)}>{stroke}{mark}</g>", name]


def _polygon(*corners: tuple[float, float]) -> Callable[[float, float], str]:
    def draw(x: float, y: float) -> str:
        return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners) + "Z"

    return draw


def _circle(x: float, y: float) -> str:
    return f"M{x - 3:.1f} {y:.1f}a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z"


_DASHES = ("none", "5 3", "1.5 2.5", "8 2.5 1.5 2.5")
_MARKS: tuple[Callable[[float, float], str], ...] = (
    _circle,
    _polygon((-2.8, -2.8), (2.8, -2.8), (2.8, 2.8), (-2.8, 2.8)),
    _polygon((0, -3.8), (3.4, 2.4), (-3.4, 2.4)),
    _polygon((0, -3.8), (3.8, 0), (0, 3.8), (-3.8, 0)),
    _polygon((0, 3.8), (3.4, -2.4), (-3.4, -2.4)),
    _polygon((-4, 0), (-1, -1), (0, -4), (1, -1), (4, 0), (1, 1), (0, 4), (-1, 1)),
)
