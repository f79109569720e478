"""What a study's report has besides the curves: how the end depends on the noise, and the study's tables."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import fmean

from dvpo.charts import COLOURS, Chart, Line
from dvpo.judgement import judged
from dvpo.report_panels import Panel
from dvpo.report_words import SPLITS
from dvpo.stats import bootstrap_interval, iqm
from dvpo.study import Study
from dvpo.study_results import Row, row_key


def robustness_panels(study: Study, rows: Sequence[Row], blind: Collection[str] = ()) -> list[Panel]:
    """For each task: accuracy at the end over the study's noises, a line an algorithm, interquartile means.

    `blind` are the tasks that the reward judged, since no truth was known.
    """
    wanted, panels = {cell.key for cell in study.cells}, []
    rows = [row for row in rows if row_key(row) in wanted]
    for task in study.names("task"):
        # A noise may be another for another task, and so may its rate.
        of_task = replace(study, cells=tuple(cell for cell in study.cells if cell.task == task))
        mine, accuracy = [row for row in rows if row["task"] == task], judged("Accuracy", task not in blind)
        charts = [_chart(of_task, mine, split, f"{accuracy}, {where}") for split, where in SPLITS]
        panels.append(Panel(task, [chart for chart in charts if not chart.empty]))
    return [panel for panel in panels if panel.charts]


def noise_axis(study: Study) -> tuple[list[str], list[tuple[float, str]]]:
    """Names of the axis' places, if it has names, and the study's noises with their places on it.

    Where one kind of noise is varied by its rate (and none at all counts as 0), the axis is that rate.
    """
    configs = {cell.noise: cell.config.noise for cell in study.cells}
    rates = {name: 0.0 if config.kind == "none" else config.rate for name, config in configs.items()}
    kinds = {config.kind for config in configs.values()} - {"none"}
    known = {rate for rate in rates.values() if rate is not None}
    if len(kinds) == 1 and len(known) == len(rates) > 1 and not any(config.then for config in configs.values()):
        return [], sorted((rate, name) for name, rate in rates.items() if rate is not None)
    names = study.names("noise")
    return names, [(float(place), name) for place, name in enumerate(names)]


def _chart(study: Study, rows: Sequence[Row], split: str, title: str) -> Chart:
    categories, places = noise_axis(study)
    lines = []
    for colour, algorithm in enumerate(study.names("algorithm")):
        mine = [row for row in rows if row["algorithm"] == algorithm and row[f"{split}_true"] is not None]
        lines.append(_line(algorithm, colour, places, mine, f"{split}_true"))
    befores = [row[f"{split}_before"] for row in rows if row[f"{split}_before"] is not None]
    if befores:
        start = [(x, fmean(befores)) for x, _ in places]
        lines.append(Line("before training", COLOURS - 1, start, dashed=True))
    note = "at the end: interquartile mean and bootstrap interval over seeds; dashed: before training"
    label = "noise" if categories else "rate of the noise"
    return Chart(title, lines, note, label, percent=True, categories=categories)


def _line(name: str, colour: int, places: Sequence[tuple[float, str]], rows: Sequence[Row], field: str) -> Line:
    """The interquartile mean over seeds at each noise, with its interval where there are several."""
    points, low, high = [], [], []
    for x, noise in places:
        scores = [row[field] for row in rows if row["noise"] == noise]
        if scores:
            middle = iqm(scores)
            ends = bootstrap_interval(iqm, scores) if len(scores) > 1 else (middle, middle)
            points.append((x, middle))
            low.append((x, ends[0]))
            high.append((x, ends[1]))
    return Line(name, colour, points, low, high, marks=True)
