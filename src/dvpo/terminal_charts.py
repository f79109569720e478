"""The charts of `charts.py` in a terminal: braille dots by plotille, colours, words and places by rich."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from plotille import Canvas
from rich.text import Text

from dvpo.charts import Axis, Chart, Line, Point, number, scales

COLOURS = ("cyan", "magenta", "yellow", "green", "bright_blue", "bright_red", "white", "bright_black")
MARK = "●"
BLANK = 0x2800
"""The braille sign without a dot; the eight lowest bits are the dots."""
FRAME = 3
"""Lines of a chart that are no canvas: title, axis, numbers below it."""
SCALE = 10
"""Columns left of the canvas."""


def draw(
    chart: Chart,
    width: int,
    height: int,
    span: tuple[float, float],
    marked: Sequence[float] = (),
    numbered: bool = False,
) -> Text:
    """The chart as text of exactly `height` lines, none longer than `width`.

    Args:
        chart: at least one of its lines has points. An interval is a column of dots at its step.
        width, height: characters, frame included.
        span: first and last step of the x axis, so that charts side by side share it.
        marked: steps that get a mark on the x axis.
        numbered: at its end a line bears the number of its colour, from 1: without colours nothing else tells lines of
            several runs apart.
    """
    columns, rows = width - SCALE, height - FRAME
    # What the running means leave out has no say in the scale.
    means = [line if line.marks else replace(line, points=binned(line.points, columns)) for line in chart.lines]
    drawn = replace(chart, lines=means)
    x_axis, y_axis = scales(drawn, max(rows // 3, 1), span)
    lines = [
        _title(chart, width, numbered),
        *_beside_scale(_dots(drawn, columns, rows, x_axis, y_axis, numbered), chart, y_axis),
        Text(f"{'└':>{SCALE}}{_rule(columns, x_axis, marked)}", "dim"),
        Text(_below(columns, x_axis), "dim"),
    ]
    return Text("\n").join(lines)


def binned(points: Sequence[Point], bins: int) -> list[Point]:
    """Means of neighbours where there are more points than bins: at most one point a bin."""
    if len(points) <= bins:
        return list(points)
    low, high = points[0][0], points[-1][0]
    groups: dict[int, list[Point]] = {}
    for x, y in points:
        groups.setdefault(min(int((x - low) / (high - low) * bins), bins - 1), []).append((x, y))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups.values()]


def colour_of(line: Line) -> str:
    return COLOURS[line.colour % len(COLOURS)]


def _title(chart: Chart, width: int, numbered: bool) -> Text:
    """The title, and each line's last value in its colour."""
    title = Text(f"{chart.title}{' (%)' if chart.percent else ''}", "bold")
    for line in chart.lines:
        if line.points:
            last = line.points[-1][1]
            value = f"{100 * last:.0f}" if chart.percent else _short(last)
            words = [f"{line.colour + 1}:" if numbered and not line.dashed else "", "┈" if line.dashed else ""]
            title.append("  ").append(" ".join(filter(None, [*words, line.name, value])), colour_of(line))
    title.truncate(width, overflow="ellipsis")
    return title


def _short(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 100 else number(value)


def _dots(chart: Chart, columns: int, rows: int, x_axis: Axis, y_axis: Axis, numbered: bool) -> list[Text]:
    """All lines of the chart in one canvas; where two meet, the later one gives the colour."""
    layers = []
    for line in chart.lines:
        canvas = _canvas(columns, rows, x_axis, y_axis)
        _plot(canvas, line, y_axis)
        if numbered and line.points:
            x, y = line.points[-1]
            canvas.point(x, _within(y, y_axis), marker=str((line.colour + 1) % 10))
        layers.append((canvas.plot("\n").split("\n"), colour_of(line)))
    return [_overlaid([(signs[row], colour) for signs, colour in layers], columns) for row in range(rows)]


def _canvas(columns: int, rows: int, x_axis: Axis, y_axis: Axis) -> Canvas:
    """A canvas whose last dots are the ends of the axes, which for plotille lie outside."""
    (x0, x1, _), (y0, y1, _) = x_axis, y_axis
    return Canvas(columns, rows, x0, y0, x1 + (x1 - x0) / (2 * columns - 1), y1 + (y1 - y0) / (4 * rows - 1))


def _plot(canvas: Canvas, line: Line, y_axis: Axis) -> None:
    points = [(x, _within(y, y_axis)) for x, y in line.points]
    for (x, low), (_, high) in zip(line.low, line.high, strict=True):
        canvas.line(x, _within(low, y_axis), x, _within(high, y_axis))
    if line.dashed:
        for x, y in points:
            canvas.point(x, y)
    else:
        for (x0, y0), (x1, y1) in pairwise(points):
            canvas.line(x0, y0, x1, y1)
    if line.marks or len(points) == 1:
        for x, y in points:
            canvas.point(x, y, marker="○" if line.dashed else MARK)


def _overlaid(layers: Sequence[tuple[str, str]], columns: int) -> Text:
    text = Text()
    for place in range(columns):
        sign, colour = chr(BLANK), ""
        for signs, own in layers:
            over = signs[place]
            if ord(over) == BLANK:
                continue
            both_dots = all(BLANK <= ord(one) < BLANK + 256 for one in (sign, over))
            sign = chr(ord(sign) | ord(over)) if both_dots else (over if ord(over) < BLANK else sign)
            colour = own
        text.append(" " if ord(sign) == BLANK else sign, colour)
    return text


def _beside_scale(rows: Sequence[Text], chart: Chart, y_axis: Axis) -> list[Text]:
    low, high, ticks = y_axis
    labels = {}
    for tick in ticks:
        row = round((high - tick) / (high - low) * (len(rows) - 1))
        labels[row] = number(100 * tick if chart.percent else tick)
    return [
        Text.assemble((f"{labels.get(i, ''):>{SCALE - 2}} {'┤' if i in labels else '│'}", "dim"), row)
        for i, row in enumerate(rows)
    ]


def _rule(columns: int, x_axis: Axis, marked: Sequence[float]) -> str:
    place = _places(columns, x_axis)
    signs = ["─"] * columns
    for tick in x_axis[2]:
        signs[place(tick)] = "┬"
    for x in marked:
        if x_axis[0] <= x <= x_axis[1]:
            signs[place(x)] = MARK
    return "".join(signs)


def _below(columns: int, x_axis: Axis) -> str:
    """The numbers of the x axis, each below its tick, as many as have room."""
    place, text = _places(columns, x_axis), ""
    for tick in x_axis[2]:
        label = number(tick)
        start = min(SCALE + place(tick) - len(label) // 2, SCALE + columns - len(label))
        if not text or start > len(text):
            text = text.ljust(start) + label
    return text


def _places(columns: int, x_axis: Axis) -> Callable[[float], int]:
    low, high, _ = x_axis
    return lambda x: round((x - low) / (high - low) * (columns - 1))


def _within(value: float, axis: Axis) -> float:
    return min(max(value, axis[0]), axis[1])
