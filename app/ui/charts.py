"""Line charts as plain HTML and SVG: sharp in light and dark, as wide as their place, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "line_chart"]


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in data units; ``colour`` is a CSS colour."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    x_end: float,
    x_words: tuple[str, str],
    y_range: tuple[float, float] | None = None,
    height: int = 132,
    digits: int = 2,
    legend: bool = True,
    label: str = "",
) -> str:
    """A chart with a legend that shows each line's last value.

    Args:
        x_end: right end of the axis, in data units; the left end is the first point's x or 1.
        x_words: what stands under the left and the right end.
        y_range: (low, high) of the vertical axis; None fits the data.
        label: what a screen reader says.
    """
    low, high = y_range or nice_range([y for line in series for _x, y in line.points])
    rules = "".join(_rule(low + (high - low) * part, part, digits) for part in (0.0, 0.5, 1.0))
    paths = "".join(_path(line, x_end, low, high) for line in series if line.points)
    words = f"<span>{escape(x_words[0])}</span><span>{escape(x_words[1])}</span>"
    return (
        f'<div class="chart" role="img" aria-label="{escape(label, quote=True)}">'
        + (_legend(series, digits) if legend else "")
        + f'<div class="plot" style="--h:{height}px">{rules}'
        + f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{paths}</svg></div>'
        + f'<div class="foot">{words}</div></div>'
    )


def nice_range(values: Sequence[float]) -> tuple[float, float]:
    """A calm range around finite values: a little air, never narrower than a twentieth."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    air = max((high - low) * 0.12, 0.025)
    step = 0.05 if high - low < 1 else 0.5
    return math.floor((low - air) / step) * step, math.ceil((high + air) / step) * step


def thin(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most ``most`` points: means of neighbours, so that a long run stays light and calm."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _x, y in group) / len(group)) for group in groups]


def smooth(points: Sequence[tuple[float, float]], keep: float = 0.9) -> list[tuple[float, float]]:
    """The exponential moving average of y, without the bias of its start."""
    found: list[tuple[float, float]] = []
    mean, weight = 0.0, 0.0
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, mean / weight))
    return found


def _rule(value: float, part: float, digits: int) -> str:
    bottom = f"bottom:{part * 100:.0f}%"
    line = "" if part == 0 else f'<div class="rule" style="{bottom}"></div>'
    words = "" if part == 0.5 else f"{value:.{digits}f}"
    return f'{line}<div class="tick" style="{bottom}">{words}</div>'


def _path(line: Series, x_end: float, low: float, high: float) -> str:
    first = min(1.0, line.points[0][0])
    width, depth = max(x_end - first, 1e-9), max(high - low, 1e-9)
    spots = [((x - first) / width * 100, 100 - (y - low) / depth * 100) for x, y in line.points if math.isfinite(y)]
    if len(spots) == 1:
        spots = [(max(spots[0][0] - 0.4, 0), spots[0][1]), (spots[0][0] + 0.4, spots[0][1])]
    way = " ".join(f"{'M' if index == 0 else 'L'}{x:.2f} {y:.2f}" for index, (x, y) in enumerate(spots))
    dash = ' stroke-dasharray="4 4"' if line.dashed else ""
    return f'<path d="{way}" stroke="{escape(line.colour, quote=True)}"{dash}/>'


def _legend(series: Sequence[Series], digits: int) -> str:
    entries = []
    for line in series:
        value = f"{line.points[-1][1]:.{digits + 1}f}" if line.points else "–"
        dot = f'<i class="dot" style="--c:{escape(line.colour, quote=True)};background:var(--c)"></i>'
        entries.append(f"<span>{dot}{escape(line.name)} <b>{value}</b></span>")
    return f'<div class="legend">{"".join(entries)}</div>'
