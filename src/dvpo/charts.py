"""Line charts as SVG text, drawn here: a page needs no library and no network, and colours follow its theme.

Colours, strokes and fonts stand in the page's style sheet, by class: `series-0`, `series-1`, ...; `band`, `faint`,
`dashed`. The script of the page reads a chart's scales from its data attributes and points at the nearest step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36
COLOURS = 8
"""Of the style sheet; further series take them again."""
POINTS = 240
"""A line has at most so many: more are not seen, and make the page large."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart, with what is around it."""

    name: str
    colour: int
    points: Sequence[Point]
    low: Sequence[Point] = ()
    """Lower edge of the interval; with `high`, over the same x."""
    high: Sequence[Point] = ()
    dashed: bool = False
    marks: bool = False
    """A dot at each point."""
    raw: Sequence[Point] = ()
    """What the line smooths, drawn faintly behind it."""


@dataclass(frozen=True)
class Chart:
    """A chart and the words around it."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    x_label: str = "step"
    percent: bool = False
    """Values are shares, shown in per cent."""
    whole: bool = False
    """The y axis starts at 0."""
    categories: Sequence[str] = ()
    """Names of x = 0, 1, ...; none: x is a number."""

    @property
    def empty(self) -> bool:
        return not any(line.points for line in self.lines)

    @property
    def svg(self) -> Markup:
        """The chart's SVG element; all text in it is escaped."""
        x_axis, y_axis = scales(self)
        place = _Place(x_axis, y_axis)
        body = Markup("").join([_grid(self, place), *(_line(line, place) for line in self.lines)])
        names = ", ".join(dict.fromkeys(line.name for line in self.lines if line.points))
        label = f"{self.title} by {self.x_label}: {names}. Arrow keys read the values."
        data = Markup('data-x0="{}" data-x1="{}" data-y0="{}" data-y1="{}"').format(*x_axis[:2], *y_axis[:2])
        names_of_x = "|".join(self.categories)
        return Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}" data-box="{}" '
            'data-percent="{}" data-x="{}" data-names="{}" {}>{}<g class="pointer"></g></svg>'
        ).format(
            WIDTH,
            HEIGHT,
            label,
            f"{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM}",
            int(self.percent),
            self.x_label,
            names_of_x,
            data,
            body,
        )


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most `POINTS` of them, evenly spaced, the last one included."""
    if len(points) <= POINTS:
        return points
    step = (len(points) - 1) / (POINTS - 1)
    return [points[round(i * step)] for i in range(POINTS)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`: 1, 2 or 5 times a power of ten apart."""
    span = high - low
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


Axis = tuple[float, float, list[float]]
"""Lowest and highest value, and the ticks between."""


@dataclass(frozen=True)
class _Place:
    """From values to the picture's coordinates."""

    x_axis: Axis
    y_axis: Axis

    def x(self, value: float) -> float:
        low, high, _ = self.x_axis
        # The page's script works the step out of it again: in ten thousand steps a tenth is three of them.
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 3)

    def y(self, value: float) -> float:
        low, high, _ = self.y_axis
        value = min(max(value, low), high)  # a wild step behind a smoothed line stays in the picture
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(x):g} {self.y(y):g}" for x, y in points)


def scales(chart: Chart, count: int = 5, span: Point | None = None) -> tuple[Axis, Axis]:
    """The axes that hold the whole chart: about `count` ticks at y; x over `span`, if that is given."""
    points = [p for line in chart.lines for part in (line.points, line.low, line.high) for p in part]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if chart.categories:
        places = [float(i) for i in range(len(chart.categories))]
        x_axis = (-0.3, len(places) - 0.7, places)
    else:
        low, high = (min(xs), max(xs)) if span is None else span
        high = high if high > low else low + 1
        marks = [tick for tick in ticks(low, high) if low <= tick <= high]
        x_axis = (low, high, [tick for tick in marks if tick % 1 == 0] if chart.x_label == "step" else marks)
    low, high = min(ys), max(ys)
    if chart.whole or 0 < low < 0.3 * high:
        low = min(low, 0.0)
    if chart.percent:
        low, high = max(low, 0.0), min(high, 1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):
        low, high = low - 0.05 * abs(low), high + 0.05 * (abs(high) or 1)
    marks = ticks(low, high, count)
    return x_axis, (marks[0], marks[-1], marks)


def _grid(chart: Chart, place: _Place) -> Markup:
    parts = []
    for tick in place.y_axis[2]:
        y = place.y(tick)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        label = number(100 * tick) if chart.percent else number(tick)
        parts.append(Markup('<text class="y" x="{}" y="{}">{}</text>').format(LEFT - 6, y + 3.5, label))
    for tick in place.x_axis[2]:
        label = chart.categories[int(tick)] if chart.categories else number(tick)
        parts.append(Markup('<text class="x" x="{}" y="{}">{}</text>').format(place.x(tick), HEIGHT - 20, label))
    parts.append(
        Markup('<text class="x name" x="{}" y="{}">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, chart.x_label
        )
    )
    return Markup("").join(parts)


def _line(line: Line, place: _Place) -> Markup:
    if not line.points:
        return Markup("")
    parts, colour = [], f"series-{line.colour % COLOURS}"
    if line.low and line.high:
        edge = place.path([*thinned(line.high), *reversed(thinned(line.low))])
        parts.append(Markup('<path class="band {}" d="{}Z"/>').format(colour, edge))
    if line.raw:
        parts.append(Markup('<path class="faint {}" d="{}"/>').format(colour, place.path(thinned(line.raw))))
    kind = "line dashed" if line.dashed else "line"
    path = place.path(thinned(line.points))
    parts.append(Markup('<path class="{} {}" data-name="{}" d="{}"/>').format(kind, colour, line.name, path))
    if line.marks or len(line.points) == 1:
        dots = [
            Markup('<circle class="{}" cx="{}" cy="{}" r="3"/>').format(colour, place.x(x), place.y(y))
            for x, y in line.points
        ]
        parts.append(Markup("").join(dots))
    return Markup("").join(parts)


def number(value: float) -> str:
    """A short form for an axis: 0.25, 1,200, 1.5e-05."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.1e}".replace(".0e", "e")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
