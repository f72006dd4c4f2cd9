"""Charts as inline SVG: text in, text out, coloured by the page's style sheet and read aloud by their titles."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 36
_CHARACTER = 7.2  # width of a label's, about
COLOURS = 6  # series that have one of their own

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, title: str, x: str, y: str) -> str:
    """A line for each named series of (x, y), with its name at the end of the legend row; says so where there are no points."""
    points = [point for each in series.values() for point in each if all(map(math.isfinite, point))]
    if not points:
        return _nothing(title)
    x_ticks, y_ticks = (ticks(min(axis), max(axis)) for axis in zip(*points, strict=True))
    place = _Frame(x_ticks, y_ticks)
    parts = [place.axes(x, y)]
    for index, (name, each) in enumerate(series.items()):
        finite = [point for point in each if all(map(math.isfinite, point))]
        path = " ".join(f"{place.x(px):.1f},{place.y(py):.1f}" for px, py in finite)
        parts.append(f'<polyline class="line c{index % COLOURS}" points="{path}"><title>{escape(name)}</title></polyline>')
        if len(finite) <= 40:
            parts += [
                f'<circle class="dot c{index % COLOURS}" cx="{place.x(px):.1f}" cy="{place.y(py):.1f}" r="3">'
                f"<title>{escape(name)}: {number(py)} at {number(px)}</title></circle>"
                for px, py in finite
            ]
    return _legend(list(series)) + _svg(title, "".join(parts))


def bar_chart(bars: Sequence[tuple[str, float]], *, title: str, x: str, y: str) -> str:
    """A bar from zero for each (label, value), labels below them where there is room."""
    if not bars or max(value for _, value in bars) <= 0:
        return _nothing(title)
    place = _Frame([0, len(bars)], ticks(0, max(value for _, value in bars)))
    every = -(-len(bars) * max(len(label) for label, _ in bars) * 9 // (WIDTH - _LEFT - _RIGHT))
    parts = [place.axes(x, y, x_labels=False)]
    width = (WIDTH - _LEFT - _RIGHT) / len(bars)
    for index, (label, value) in enumerate(bars):
        left, top = place.x(index), place.y(value)
        parts.append(
            f'<rect class="bar" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(1.0, width - 1):.1f}" height="{place.y(0) - top:.1f}">'
            f"<title>{escape(label)}: {number(value)}</title></rect>"
        )
        if index % every == 0:
            parts.append(_centred(label, left + width / 2, HEIGHT - _BOTTOM + 16))
    return _svg(title, "".join(parts))


def interval_chart(
    rows: Sequence[tuple[str, Sequence[tuple[float, float | None, float | None] | None]]], names: Sequence[str], *, title: str
) -> str:
    """A row for each label, in it a dot with the interval (value, low, high) of each name; None is left out."""
    ends = [end for _, values in rows for value in values if value for end in value if end is not None]
    if not ends:
        return _nothing(title)
    left, row_height = 12 + 6.8 * max(len(label) for label, _ in rows), 14 + 8 * len(names)
    height = row_height * len(rows) + 34
    marks = ticks(min(0.0, *ends), max(ends), 4)
    scale = (WIDTH - left - _RIGHT) / (marks[-1] - marks[0])

    def at(value: float) -> float:
        return left + (value - marks[0]) * scale

    parts = [
        f'<line class="grid" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="4" y2="{height - 24}"/>'
        + _centred(number(mark), at(mark), height - 8)
        for mark in marks
    ]
    for row, (label, values) in enumerate(rows):
        top = 6 + row * row_height
        parts.append(f'<text x="{left - 8:.1f}" y="{top + row_height / 2 + 1:.1f}" text-anchor="end">{escape(label)}</text>')
        for index, value in enumerate(values):
            if value is None:
                continue
            mean, low, high = value
            y = top + 10 + 8 * index
            if low is not None and high is not None:
                parts.append(f'<line class="line c{index % COLOURS}" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y}" y2="{y}"/>')
            between = "" if low is None or high is None else f", {number(low)} to {number(high)}"
            parts.append(
                f'<circle class="dot c{index % COLOURS}" cx="{at(mean):.1f}" cy="{y}" r="3.5">'
                f"<title>{escape(label)}, {escape(names[index])}: {number(mean)}{between}</title></circle>"
            )
    return (_legend(names) if len(names) > 1 else "") + _svg(title, "".join(parts), height)


def share_bar(shares: Mapping[str, float], *, title: str) -> str:
    """One bar, cut into named shares of the whole."""
    parts, left = [], 0.0
    for index, (name, share) in enumerate(shares.items()):
        width = max(0.0, share) * WIDTH
        parts.append(
            f'<rect class="share c{index % COLOURS}" x="{left:.1f}" y="2" width="{width:.1f}" height="26">'
            f"<title>{escape(name)}: {share:.1%}</title></rect>"
        )
        left += width
    return _legend([f"{name} {share:.0%}" for name, share in shares.items()]) + _svg(title, "".join(parts), 30)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers, from one not above `low` to one not below `high`, which differ."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as people read it: thousands in groups, fractions to four significant digits."""
    if not math.isfinite(value):
        return "–"
    if value == round(value):
        return f"{round(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


class _Frame:
    """Where numbers lie in a chart whose axes begin and end at ticks."""

    def __init__(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        self._x, self._y = x_ticks, y_ticks

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x[0]) / (self._x[-1] - self._x[0]) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self._y[0]) / (self._y[-1] - self._y[0]) * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, x: str, y: str, x_labels: bool = True) -> str:
        parts = [
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
            for tick in self._y
        ]
        for tick in self._x if x_labels else ():
            parts.append(_centred(_short(tick), self.x(tick), HEIGHT - _BOTTOM + 16))
        parts.append(f'<text class="name" x="{WIDTH - _RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x)}</text>')
        parts.append(f'<text class="name" x="2" y="{HEIGHT - 5}">{escape(y)}</text>')
        return "".join(parts)


def _centred(label: str, x: float, y: float) -> str:
    """A label below x, as far to the left as it has to be to end within the chart."""
    return f'<text x="{min(x, WIDTH - _CHARACTER * len(label) / 2):.1f}" y="{y}" text-anchor="middle">{escape(label)}</text>'


def _short(value: float) -> str:
    """A tick in little room."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.4g}{letter}"
    return number(round(value, 10))


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<li><i class="c{index % COLOURS}"></i>{escape(name)}</li>' for index, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def _svg(title: str, content: str, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">{content}</svg>'


def _nothing(title: str) -> str:
    return f'<p class="note">{escape(title)}: nothing to show.</p>'
