"""Charts as inline SVG, for self-contained pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

# Okabe and Ito's palette, which color-blind readers can distinguish.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 40
MAX_POINTS = 400

DASHES = ("", "6 3", "2 2", "9 3 2 3")
"""Dash patterns of lines beyond the first six, which reuse the colors."""


class Series(NamedTuple):
    """One line. `faint` lines are in the background and not in the legend. band: minimum and maximum at each x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    color: int = 0
    dots: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None


def line_chart(title: str, series: Sequence[Series], x_label: str = "step", legend_below: bool = False) -> str:
    """An SVG line chart without the points that are not finite; an empty string if no point is left.

    legend_below: put the names in rows under the chart, where there are many.
    """
    series = [_drawn(s) for s in series]
    series = [s for s in series if s.x]
    if not series:
        return ""
    heights = [y for s in series for values in (s.y, *(s.band or ())) for y in values]
    x_ticks = _ticks(min(min(s.x) for s in series), max(max(s.x) for s in series))
    y_ticks = _ticks(min(heights), max(heights))
    names = [s.name for s in series if s.name and not s.faint]
    columns = max(1, int((WIDTH - 10) / (40 + CHARACTER * max(map(len, names), default=0))))
    rows = -(-len(names) // columns) if legend_below else 0
    out, x_at, y_at = _frame(title, x_ticks, y_ticks, x_label, HEIGHT + 18 * rows)
    for s in series:
        if s.band:
            low, high = ([f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(s.x, edge)] for edge in s.band)
            out.append(f'<polygon points="{" ".join(low + high[::-1])}" fill="{_color(s)}" opacity="0.15"/>')
    named = 0
    for s in series:
        color, dash = _color(s), DASHES[s.color // len(COLORS) % len(DASHES)]
        points = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(s.x, s.y))
        opacity, width = (0.25, 1) if s.faint else (1, 2)
        stroke = f'stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}" opacity="{opacity}"'
        out.append(f'<polyline points="{points}" fill="none" {stroke}/>')
        if s.dots:
            out += [f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5" fill="{color}"/>' for x, y in zip(s.x, s.y)]
        if s.faint or not s.name:
            continue
        if legend_below:
            x, y = 14 + named % columns * (WIDTH - 10) / columns, HEIGHT + 12 + 18 * (named // columns)
            out.append(f'<line x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}" {stroke}/>')
            out.append(f'<text class="tick" x="{x + 25}" y="{y}">{escape(_cut(s.name, 65))}</text>')
        else:  # right of the title, from the right edge inwards
            x = WIDTH - RIGHT - 90 * named
            out.append(
                f'<text class="tick" x="{x}" y="16" text-anchor="end" style="fill:{color}">{escape(s.name)}</text>'
            )
        named += 1
    return "".join([*out, "</svg>"])


def _color(series: Series) -> str:
    return COLORS[series.color % len(COLORS)]


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def scatter_chart(title: str, points: Sequence[tuple[str, float, float]], x_label: str) -> str:
    """An SVG of named points ``(name, x, y)``.

    Points on the Pareto front are joined by a line: no other point has a higher y at the same or a lower x. The others
    are hollow.
    """
    x_ticks = _ticks(min(x for _, x, _ in points), max(x for _, x, _ in points))
    y_ticks = _ticks(min(y for *_, y in points), max(y for *_, y in points))
    out, x_at, y_at = _frame(title, x_ticks, y_ticks, x_label, HEIGHT)
    best = [p for p in points if not any(x <= p[1] and y >= p[2] and (x, y) != p[1:] for _, x, y in points)]
    corners = [(x_at(x), y_at(y)) for _, x, y in sorted(best, key=lambda p: p[1])]
    taken = [box for pair in zip(corners, corners[1:]) for box in _along(*pair)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    out.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[0]}" stroke-width="1.5" opacity="0.6"/>')
    places = {p: (x_at(p[1]), y_at(p[2])) for p in points}
    for p, (x, y) in places.items():
        fill = COLORS[0] if p in best else "#fff"
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{COLORS[0]}"/>')
    taken += [(x - 5, y - 5, x + 5, y + 5) for x, y in places.values()]
    for (name, *_), (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        text = _cut(name, 30)
        left, low = _room(x, y, CHARACTER * len(text), taken)
        taken.append((left, low - 9, left + CHARACTER * len(text), low + 2))
        if abs(low - 4 - y) > 8:
            # far from its point: a line connects the two
            end = left - 2 if left > x else left + CHARACTER * len(text) + 2
            out.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{low - 4:.1f}"/>')
        out.append(f'<text class="tick" x="{left:.1f}" y="{low:.1f}">{escape(text)}</text>')
    return "".join([*out, "</svg>"])


CHARACTER = 6.2
"""Maximum width of a character of a label, in pixels."""

Box = tuple[float, float, float, float]


def _room(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[float, float]:
    """The free position of a label that is nearest to its point, as the left end of its baseline."""
    for far in range(0, HEIGHT, 2):
        for shift in (far, -far):
            for left in (x + 9 + min(far, 14), x - 9 - min(far, 14) - width):
                low = y + 4 + shift
                box = (left, low - 9, left + width, low + 2)
                inside = left >= LEFT and box[2] <= WIDTH - 2 and box[1] >= TOP - 6 and low <= HEIGHT - BOTTOM + 5
                if inside and not any(_overlap(box, other) for other in taken):
                    return left, low
    return x + 9, y + 4


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Boxes that cover a line."""
    pieces = max(1, math.ceil(math.dist(start, end) / 4))
    middles = [[a + (b - a) * i / pieces for a, b in zip(start, end)] for i in range(pieces + 1)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in middles]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _frame(
    title: str, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, height: int
) -> tuple[list[str], Callable[[float], float], Callable[[float], float]]:
    """The beginning of a chart: its title, grid and axes; and functions from x and y values to pixels."""

    def x_at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]))

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ((value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    out.append(f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>')
    for tick in y_ticks:
        y = y_at(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        label = _label(tick)
        x = min(x_at(tick), WIDTH - 4 - CHARACTER * len(label) / 2)  # the last one stays within the frame
        out.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return out, x_at, y_at


def smooth(values: Sequence[float | None], weight: float = 0.9) -> list[float]:
    """Average around each value, in which a value at distance d counts ``weight ** d``; missing values do not count.

    It looks both ways, so the line does not lag behind the values.
    """
    before, after = _sums(values, weight), _sums(values[::-1], weight)[::-1]
    own = [(0.0, 0.0) if value is None else (value, 1.0) for value in values]  # is in both sums
    pairs = [(s + t - x, m + n - k) for (s, m), (t, n), (x, k) in zip(before, after, own)]
    return [total / norm if norm else math.nan for total, norm in pairs]


def _sums(values: Sequence[float | None], weight: float) -> list[tuple[float, float]]:
    """Weighted sum of the values up to each one, and the sum of their weights."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total, weight * norm
        if value is not None:
            total, norm = total + value, norm + 1
        out.append((total, norm))
    return out


def _drawn(series: Series) -> Series:
    """The finite points of a series; of more than `MAX_POINTS`, every second, third, ..."""
    finite = [i for i, y in enumerate(series.y) if math.isfinite(y)]
    kept = finite[:: max(1, math.ceil(len(finite) / MAX_POINTS))]
    band = series.band and tuple([edge[i] for i in kept] for edge in series.band)
    return series._replace(x=[series.x[i] for i in kept], y=[series.y[i] for i in kept], band=band)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover ``low`` to ``high``, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _label(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:.6g}"
