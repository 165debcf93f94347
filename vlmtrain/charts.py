"""Charts as inline SVG, for pages that must stand alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 40
MAX_POINTS = 400


class Series(NamedTuple):
    """One line: `faint` ones are drawn behind, without an entry in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    color: int = 0
    dots: bool = False


def line_chart(title: str, series: Sequence[Series], x_label: str = "step", legend_below: bool = False) -> str:
    """An SVG line chart; points that are not finite are left out. An empty string without any point.

    legend_below: put the names in rows under the chart, where there are many.
    """
    series = [_thin(_finite(s)) for s in series]
    series = [s for s in series if s.x]
    if not series:
        return ""
    x_ticks = _ticks(min(min(s.x) for s in series), max(max(s.x) for s in series))
    y_ticks = _ticks(min(min(s.y) for s in series), max(max(s.y) for s in series))

    def x_at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(value, x_ticks)

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(value, y_ticks)

    rows = -(-sum(not s.faint and bool(s.name) for s in series) // 3) if legend_below else 0
    out = _frame(title, x_ticks, y_ticks, x_at, y_at, x_label, HEIGHT + 18 * rows)
    named = 0
    for s in series:
        color = COLORS[s.color % len(COLORS)]
        points = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(s.x, s.y))
        opacity, width = (0.25, 1) if s.faint else (1, 2)
        out.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}" opacity="{opacity}"/>'
        )
        if s.dots:
            out += [f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5" fill="{color}"/>' for x, y in zip(s.x, s.y)]
        if not s.faint and s.name and legend_below:
            column, row = named % 3, named // 3
            x, y = LEFT - 50 + column * 145, HEIGHT + 12 + 18 * row
            out.append(f'<text class="tick" x="{x}" y="{y}" style="fill:{color}">{escape(s.name[:24])}</text>')
            named += 1
        elif not s.faint and s.name:
            # right of the title, from the right edge inwards
            x = WIDTH - RIGHT - 90 * named
            out.append(
                f'<text class="tick" x="{x}" y="16" text-anchor="end" style="fill:{color}">{escape(s.name)}</text>'
            )
            named += 1
    return "".join([*out, "</svg>"])


def scatter_chart(title: str, points: Sequence[tuple[str, float, float]], x_label: str, front: bool = False) -> str:
    """An SVG of named points ``(name, x, y)``.

    front: join those that no other beats at less x (the Pareto front), and draw the others hollow.
    """
    x_ticks = _ticks(min(x for _, x, _ in points), max(x for _, x, _ in points))
    y_ticks = _ticks(min(y for *_, y in points), max(y for *_, y in points))

    def x_at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(value, x_ticks)

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(value, y_ticks)

    out = _frame(title, x_ticks, y_ticks, x_at, y_at, x_label, HEIGHT)
    best = [p for p in points if not any(x <= p[1] and y >= p[2] and (x, y) != p[1:] for _, x, y in points)]
    if front:
        line = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for _, x, y in sorted(best, key=lambda p: p[1]))
        out.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[0]}" stroke-width="1.5" opacity="0.6"/>')
    taken: list[tuple[float, float, float]] = []
    for name, x_value, y_value in sorted(points, key=lambda p: -p[2]):
        x, y = x_at(x_value), y_at(y_value)
        fill = COLORS[0] if not front or (name, x_value, y_value) in best else "#fff"
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{COLORS[0]}"/>')
        width = 6.2 * len(name)
        to_left = x + 8 + width > WIDTH - 2
        left, below = (x - 8 - width, y + 4) if to_left else (x + 8, y + 4)
        # move a label down until it covers no other
        while any(left < end and left + width > start and abs(below - b) < 11 for start, end, b in taken):
            below += 3
        taken.append((left, left + width, below))
        out.append(f'<text class="tick" x="{left:.1f}" y="{below:.1f}">{escape(name)}</text>')
    return "".join([*out, "</svg>"])


def _frame(
    title: str,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    x_label: str,
    height: int,
) -> list[str]:
    """The beginning of a chart: its title, grid and axes."""
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    out.append(f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>')
    for tick in y_ticks:
        y = y_at(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        out.append(
            f'<text class="tick" x="{x_at(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
            f"{_label(tick)}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return out


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def _finite(series: Series) -> Series:
    kept = [(x, y) for x, y in zip(series.x, series.y) if math.isfinite(y)]
    return series._replace(x=[x for x, _ in kept], y=[y for _, y in kept])


def _thin(series: Series) -> Series:
    stride = max(1, math.ceil(len(series.x) / MAX_POINTS))
    return series._replace(x=series.x[::stride], y=series.y[::stride])


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover ``low`` to ``high``, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _share(value: float, ticks: Sequence[float]) -> float:
    return (value - ticks[0]) / (ticks[-1] - ticks[0])


def _label(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"
