"""Charts: lines stay inside, long runs stay light, nothing of a user becomes markup."""

from __future__ import annotations

import re

import pytest

from app.ui.charts import Series, line_chart, nice_range, smooth, thin


def test_lines_start_left_and_end_right() -> None:
    chart = line_chart(
        [Series("a", "red", [(1, 0.1), (2, 0.2), (3, 0.3)])], x_end=3, x_words=("1", "3"), y_range=(0, 1)
    )
    assert 'd="M0.00 90.00 L50.00 80.00 L100.00 70.00"' in chart


def test_a_line_that_has_just_begun_is_visible() -> None:
    chart = line_chart([Series("a", "red", [(1, 0.5)])], x_end=10, x_words=("", ""))
    assert chart.count("L") >= 1


def test_numbers_that_are_none_are_left_out() -> None:
    chart = line_chart([Series("a", "red", [(1, 0.5), (2, float("nan")), (3, 0.4)])], x_end=3, x_words=("", ""))
    path = re.search(r'd="([^"]+)"', chart)
    assert path is not None
    assert "nan" not in path.group(1)


@pytest.mark.parametrize("values", [[], [0.2], [0.2, 0.2], [-1.0, 4.0], [float("nan"), 0.3]])
def test_the_range_holds_every_value(values: list[float]) -> None:
    low, high = nice_range(values)
    assert low < high
    assert all(low <= value <= high for value in values if value == value)


def test_long_runs_are_thinned_to_means() -> None:
    points = thin([(float(i), float(i % 2)) for i in range(10_000)])
    assert len(points) <= 240
    assert all(0.4 < y < 0.6 for _x, y in points)


def test_smoothing_keeps_a_constant() -> None:
    assert [round(y, 9) for _x, y in smooth([(i, 2.0) for i in range(5)])] == [2.0] * 5


def test_names_are_escaped() -> None:
    chart = line_chart([Series("<i>", 'x" onload="y', [(1, 1)])], x_end=1, x_words=("<", ">"), label='"')
    assert "<i>" not in chart
    assert 'onload="y' not in chart
