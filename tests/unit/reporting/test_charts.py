"""Charts: labels, lines and the Pareto front."""

from __future__ import annotations

import math
import re

import pytest

from vlmtrain.reporting.charts import Series, line_chart, scatter_chart, smooth


def test_a_line_joins_the_pareto_front():
    points = [("cheap", 1.0, 0.2), ("beaten", 2.0, 0.1), ("good", 3.0, 0.5), ("dear", 4.0, 0.5)]
    chart = scatter_chart("t", points, "x")
    line = chart.split('<polyline points="')[1].split('"')[0]
    assert len(line.split()) == 2 and chart.count('fill="#fff"') == 2


def test_labels_of_coinciding_points_do_not_overlap():
    points = [(f"a_long_name_{i}", 16.0, 0.5 + i / 1000) for i in range(9)] + [("other", 64.0, 0.9)]
    chart = scatter_chart("t", points, "x")
    labels = re.findall(r'<text class="tick" x="([\d.]+)" y="([\d.]+)">(a_long_name_\d|other)<', chart)
    assert len(labels) == 10
    boxes = [(float(x), float(y), float(x) + 6.2 * len(name)) for x, y, name in labels]
    for i, (left, low, right) in enumerate(boxes):
        assert left >= 0 and right <= 460 and 0 <= low <= 230
        for start, other, end in boxes[i + 1 :]:
            assert abs(low - other) >= 11 or right <= start or end <= left


def test_lines_beyond_six_differ_by_their_strokes():
    series = [
        Series(f"line {i}", [0.0, 1.0], [0.0, float(i)], color=i, band=([0.0, 0.0], [1.0, 9.0])) for i in range(24)
    ]
    chart = line_chart("t", series, legend_below=True)
    strokes = re.findall(r'<polyline points="[^"]*" fill="none" stroke="([^"]*)" [^>]*dasharray="([^"]*)"', chart)
    assert len(set(strokes)) == 24 and chart.count("<polygon") == 24


def test_smoothing_does_not_lag():
    """A straight line stays where it is, away from its ends, and a step is crossed half-way at the step."""
    line = [0.5 * i for i in range(400)]
    assert smooth(line)[150:250] == pytest.approx(line[150:250], rel=1e-6)
    step = smooth([0.0] * 200 + [1.0] * 200)
    assert step[199] + step[200] == pytest.approx(1.0) and step[199] < 0.5 < step[200]


def test_smoothing_is_an_average_without_the_missing_values():
    assert smooth([3.0, None, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 3.0], weight=0.5) == pytest.approx([(1 + 1.5) / 1.5, (3 + 0.5) / 1.5])
    assert all(map(math.isnan, smooth([None, None])))
