"""What a study's report has besides the curves: how the end depends on the noise, and the study's tables."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from dvpo.charts import Chart, Line, Point
from dvpo.report_panels import Panel
from dvpo.stats import bootstrap_interval, iqm
from dvpo.study import Study
from dvpo.study_results import Row

SPLITS = (("id", "in distribution"), ("ood", "out of distribution"))


def robustness_panels(study: Study, rows: Sequence[Row]) -> list[Panel]:
    """For each task: true accuracy at the end over the study's noises, a line an algorithm, interquartile means."""
    panels = []
    for task in study.names("task"):
        charts = [_chart(study, [row for row in rows if row["task"] == task], *split) for split in SPLITS]
        panels.append(Panel(task, [chart for chart in charts if not chart.empty]))
    return [panel for panel in panels if panel.charts]


def noise_scale(study: Study) -> tuple[list[Any], list[float]]:
    """The study's noises with their places on the axis: their rates if one kind (and none at all) is varied."""
    noises = study.names("noise")
    configs = {cell.noise: cell.config.noise for cell in study.cells}
    strength = {name: 0.0 if c.kind == "none" else c.rate for name, c in configs.items() if not c.then}
    kinds = {c.kind for c in configs.values()} - {"none"}
    rates = [strength.get(name) for name in noises]
    if len(kinds) == 1 and None not in rates and len(set(rates)) == len(rates) > 1:
        pairs = sorted((rate, name) for rate, name in zip(rates, noises, strict=True) if rate is not None)
        return [], [rate for rate, _ in pairs]
    return noises, [float(i) for i in range(len(noises))]


def _chart(study: Study, rows: Sequence[Row], split: str, name: str) -> Chart:
    categories, _ = noise_scale(study)
    lines = []
    for colour, algorithm in enumerate(study.names("algorithm")):
        points, low, high = [], [], []
        for x, noise in _placed(study):
            scores = [
                row[f"{split}_true"]
                for row in rows
                if (row["algorithm"], row["noise"]) == (algorithm, noise) and row[f"{split}_true"] is not None
            ]
            if scores:
                points.append((x, iqm(scores)))
                ends = bootstrap_interval(iqm, scores) if len(scores) > 1 else (points[-1][1],) * 2
                low.append((x, ends[0]))
                high.append((x, ends[1]))
        lines.append(Line(algorithm, colour, points, low, high, marks=True))
    befores = [row[f"{split}_before"] for row in rows if row[f"{split}_before"] is not None]
    if befores:
        start: list[Point] = [(x, fmean(befores)) for x, _ in _placed(study)]
        lines.append(Line("before training", len(lines), start, dashed=True))
    label = "noise" if categories else "rate of the noise"
    note = "true greedy accuracy at the end: interquartile mean and bootstrap interval over seeds"
    return Chart(f"True accuracy, {name}", lines, note, label, percent=True, categories=categories)


def _placed(study: Study) -> list[tuple[float, str]]:
    categories, places = noise_scale(study)
    if categories:
        return list(zip(places, categories, strict=True))
    configs = {cell.noise: cell.config.noise for cell in study.cells}
    rates = {name: 0.0 if c.kind == "none" else float(c.rate or 0) for name, c in configs.items()}
    return sorted((rate, name) for name, rate in rates.items())
