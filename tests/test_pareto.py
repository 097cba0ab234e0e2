"""The figures of a comparison: a front, an axis, numbers and lines that do not hide each other."""

import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from alula.report.figures import Line, line_chart
from alula.report.pareto import Spot, front, scatter, span


def test_the_front_leaves_out_what_is_beaten_and_what_is_a_reference():
    spots = [
        Spot(label="cheap", number=1, colour=1, x=1, y=20),
        Spot(label="beaten", number=2, colour=2, x=2, y=19),
        Spot(label="good", number=3, colour=3, x=3, y=50),
        Spot(label="joint", number=4, colour=4, x=1, y=90, is_reference=True),
    ]
    assert [spot.label for spot in front(spots, is_lower_x_better=True, is_lower_y_better=False)] == ["cheap", "good"]
    assert [spot.label for spot in front(spots, is_lower_x_better=False, is_lower_y_better=True)] == ["beaten", "good"]
    drawn = scatter(spots, x_label="x", y_label="y", x_unit=str, y_unit=str, description="d")
    assert re.findall(r">(\d)</text>", drawn) == ["1", "2", "3", "4"]
    assert drawn.count("hollow") == 1


@pytest.mark.parametrize("values", [(0.0,), (5.0,), (3.0, 3.0), (-2.0, 7.0), (1e3, 4e8), (0.0, 9e6), (30.0, 900.0)])
def test_an_axis_spans_its_values(values):
    axis = span(values)
    assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in values)
    assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in axis.ticks)
    assert 2 <= len(axis.ticks) <= 9


def test_numbers_of_coinciding_spots_do_not_hide_each_other():
    at = [(1.0, 5.0)] * 6 + [(1.01, 5.0), (1.0, 5.02), (9.0, 0.0), (9.0, 0.0)]
    spots = [Spot(label=str(n), number=n, colour=1, x=x, y=y) for n, (x, y) in enumerate(at, start=1)]
    drawn = scatter(spots, x_label="x", y_label="y", x_unit=str, y_unit=str, description="d")
    places = [(float(x), float(y)) for x, y in re.findall(r'class="spot c1" cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert len(places) == len(spots)
    assert all(abs(a - c) >= 15.9 or abs(b - d) >= 15.9 for (a, b), (c, d) in combinations(places, 2))
    assert drawn.count('class="leader') == drawn.count('class="place') == 8  # one of the eight here and one of the two there stay in place


def test_lines_that_end_together_have_their_numbers_apart():
    lines = [Line(label=f"m{n}", colour=n, points=((0, 0.0), (1, 50.0 if n < 9 else 0.0)), number=n) for n in range(1, 13)]
    drawn = line_chart(lines, x_labels=["base", "a"], unit=str, description="d", learnt=1)
    heights = sorted(float(y) for y in re.findall(r'class="number" x="[\d.]+" y="([\d.]+)"', drawn))
    assert len(heights) == 12
    assert all(after - before >= 10.9 for before, after in pairwise(heights))
    assert drawn.count('class="learnt-here"') == 1
    high = [Line(label="high", colour=1, points=((0, 80.0), (1, 80.5)))]
    ticks = re.findall(
        r'class="tick end" x="[\d.]+" y="[\d.]+">([\d.]+)<', line_chart(high, x_labels=[], unit=str, description="d", from_zero=False)
    )
    assert 79 < float(ticks[0]) < 80 and 80.5 < float(ticks[-1]) < 82
    assert "number" not in line_chart([replace(lines[0], number=0)], x_labels=["base", "a"], unit=str, description="d")
