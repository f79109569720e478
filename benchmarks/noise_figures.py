"""The figures of docs/results.md: pictures that stand alone, made from a study's rows."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from markupsafe import Markup

from dvpo.charts import HEIGHT, WIDTH, Chart, Line
from dvpo.report_study import robustness_panels
from dvpo.stats import PairedDifference
from dvpo.study import Study
from dvpo.study_results import Row
from dvpo.study_table import SPLITS, compare

TOP, LINE = 34, HEIGHT + 34
"""Height of the legend, and of a line of charts with their titles."""
COLOURS = ("#2563b8", "#d9661f", "#25855a", "#8e4db8", "#b3870b", "#c0334d", "#138a99", "#6b7280")
STYLE = (
    "svg text{font-size:11px;fill:#5c6370} .x{text-anchor:middle} .y{text-anchor:end} path{fill:none} "
    ".grid{stroke:#ececE8} .line{stroke-width:2} .dashed{stroke-dasharray:5 4} svg .band{stroke:none;opacity:.14} "
    + " ".join(
        f".line.series-{i}{{stroke:{colour}}} .band.series-{i},circle.series-{i},.name-{i}{{fill:{colour}!important}}"
        for i, colour in enumerate(COLOURS)
    )
)


def contrasts(study: Study, rows: Sequence[Row], first: str) -> list[tuple[str, str, PairedDifference]]:
    """(algorithm, split, first less that algorithm) over the pairs that are there, of seeds complete in all places."""
    others = [name for name in study.names("algorithm") if name != first]
    found = []
    for name in others:
        for split in SPLITS:
            difference = compare(study, rows, first, name, split)
            if difference is not None:
                found.append((name, split, difference))
    return found


def differences(study: Study, rows: Sequence[Row], first: str = "dvpo") -> Markup | None:
    """A line a contrast with its 95% interval; None if nothing can be compared."""
    lines = [line for line in contrasts(study, rows, first) if line[2].pairs > 1]
    if not lines:
        return None
    reach = max(5.0, *(abs(end) for _, _, d in lines for end in (d.low, d.high)))
    width, left, height = 640, 190, 50 + 22 * len(lines)

    def x(value: float) -> float:
        return round(left + (value + reach) / (2 * reach) * (width - left - 20), 1)

    body = [Markup('<path d="M{0} 10V{1}" stroke="#888"/>').format(x(0), height - 34)]
    for place, (name, split, difference) in enumerate(lines):
        y = 24 + 22 * place
        body.append(
            Markup(
                '<text x="8" y="{0}">{1}, {2} ({3})</text><path d="M{4} {5}H{6}" stroke="#27b" stroke-width="2"/>'
                '<circle cx="{7}" cy="{5}" r="4" fill="#27b"/>'
            ).format(y + 4, name, split.upper(), difference.pairs, x(difference.low), y, x(difference.high),
                     x(difference.mean))
        )  # fmt: skip
    for tick in (-reach, 0.0, reach):
        label, at = f"{tick:+.1f}" if tick else "0", x(tick) if abs(tick) < reach else x(tick * 0.95)
        body.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(at, height - 18, label))
    title = f"{first} less each row, points of true accuracy over all places, paired by seed (number of pairs)"
    body.append(Markup('<text x="8" y="{}">{}</text>').format(height - 3, title))
    return _picture(width, height, Markup("").join(body))


def curves(study: Study, rows: Sequence[Row]) -> Markup | None:
    """Accuracy at the end over the study's noises, a line an algorithm; None if no algorithm has two of them."""
    charts = [chart for panel in robustness_panels(study, rows) for chart in panel.charts]
    if not any(len(line.points) > 1 and not line.dashed for chart in charts for line in chart.lines):
        return None
    return _sheet(charts, columns=2)


def learning(split: str) -> Callable[[Study, Sequence[Row]], Markup | None]:
    """A drawing of the mean accuracy over the steps, a chart a place, three in a line."""

    def drawn(study: Study, rows: Sequence[Row]) -> Markup | None:
        charts = [_course(study, [r for r in rows if (r["task"], r["noise"]) == p], p, split) for p in study.places]
        return _sheet([chart for chart in charts if not chart.empty])

    return drawn


def _course(study: Study, rows: Sequence[Row], place: tuple[str, str], split: str) -> Chart:
    column, lines = 1 + SPLITS.index(split), []
    for colour, name in enumerate(study.names("algorithm")):
        runs = [row["curve"] for row in rows if row["algorithm"] == name]
        points = [(points[0][0], fmean(p[column] for p in points)) for points in zip(*runs, strict=True)]
        lines.append(Line(name, colour, points))
    return Chart(f"{', '.join(place)}: {split.upper()}", lines, percent=True)


def _sheet(charts: Sequence[Chart], columns: int = 3) -> Markup | None:
    """The charts, `columns` in a line, and one legend."""
    if not charts:
        return None
    body = Markup("").join(_placed(chart, place % columns, place // columns) for place, chart in enumerate(charts))
    names = [line for line in charts[0].lines if line.points]
    legend = Markup("").join(
        Markup('<text class="name-{}" x="{}" y="20">{}</text>').format(
            line.colour % len(COLOURS), 46 + 110 * i, line.name
        )
        for i, line in enumerate(names)
    )
    width, height = WIDTH * min(columns, len(charts)), LINE * math.ceil(len(charts) / columns) + TOP
    return _picture(width, height, Markup("<style>{}</style>").format(Markup(STYLE)) + legend + body)


def _placed(chart: Chart, column: int, line: int) -> Markup:
    x, y = WIDTH * column, TOP + LINE * line
    return Markup(
        '<svg x="{0}" y="{1}" width="{2}" height="{3}">{4}</svg><text x="{5}" y="{6}" font-weight="bold">{7} (%)</text>'
    ).format(x, y + 24, WIDTH, HEIGHT, chart.svg, x + 46, y + 14, chart.title)


def _picture(width: int, height: int, body: Markup) -> Markup:
    """It needs no style sheet from outside."""
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" font-family="sans-serif" font-size="12">'
        '<rect width="{0}" height="{1}" fill="white"/>{2}</svg>\n'
    ).format(width, height, body)
