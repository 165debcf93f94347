"""Line charts as inline SVG, for pages that must stand alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """An SVG line chart; points that are not finite are left out. An empty string without any point."""
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

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
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
        if not s.faint and s.name:
            # right of the title, from the right edge inwards
            x = WIDTH - RIGHT - 90 * named
            out.append(
                f'<text class="tick" x="{x}" y="16" text-anchor="end" style="fill:{color}">{escape(s.name)}</text>'
            )
            named += 1
    return "".join([*out, "</svg>"])


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
