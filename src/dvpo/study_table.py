"""The tables of a study, made from its results file alone: who ended where, against a baseline, with intervals.

A table for each task and noise, and one over all of them. An algorithm's line says how many of its seeds are there;
where some are missing it is marked, for its figures are then not those that the study planned.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console
from rich.table import Table

from dvpo.config import to_plain
from dvpo.errors import InputError
from dvpo.judgement import BY_REWARD, judged, names_truth
from dvpo.nested import flat
from dvpo.stats import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    holm,
    iqm,
    paired_difference,
    probability_of_improvement,
)
from dvpo.study import CellKey, Study, cell_id
from dvpo.study_results import Row, row_key

SPLITS = ("id", "ood")
NONE = "-"
SHORT = " !"
"""Marks a number of seeds that is not the planned one."""
LISTED = 10
"""So many missing cells are named one by one."""

Place = tuple[str, str]
"""(task, noise)"""


@dataclass(frozen=True)
class Sheet:
    """One table, as text."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """All tables of a study, and what has to be said about them."""

    sheets: tuple[Sheet, ...]
    notes: tuple[str, ...]


def make_report(
    study: Study,
    rows: Sequence[Row],
    baseline: str | None = None,
    averaged: bool = False,
    blind: Collection[str] | None = None,
) -> Report:
    """The tables of the study's cells.

    Args:
        study: which cells there should be.
        rows: of the results file; those of other cells are counted and left out.
        baseline: the algorithm that the others are compared with; None: as `find_baseline` finds it.
        averaged: the ends are means over the last quarter's evaluations (`last_quarter`), and are called so.
        blind: the tasks that the reward judged, since no truth was known; None: those for which none was named.

    Raises:
        InputError: the baseline is no algorithm of the study, or none of the cells has a row.
    """
    data = _Data(study, rows, find_baseline(baseline, study.names("algorithm")))
    if not data.rows:
        raise InputError("the results file holds no row of these cells: run the study first")
    sheets = _family(data, [[place] for place in study.places])
    if len(study.places) > 1:
        sheets += [*_family(data, [study.places]), *overviews(study, rows)]
    if blind is None:
        blind = {cell.task for cell in study.cells if not names_truth(flat(to_plain(cell.config)))}
    accuracy = _accuracy(study.names("task"), blind)
    return Report(tuple(sheets), _notes(data, accuracy, len(rows) - len(data.rows), averaged))


def find_baseline(named: str | None, algorithms: Sequence[str], of: str = "cells") -> str:
    """Whom the others are compared with: who is named, else `ppo`, else, where that is not there, the first of them.

    Raises:
        InputError: the named one is none of them.
    """
    if named is None:
        return "ppo" if "ppo" in algorithms else algorithms[0]
    if named not in algorithms:
        known = (", " if of == "cells" else "; ").join(algorithms)  # names of runs may hold commas
        raise InputError(f"--baseline = {named} is no algorithm of these {of}: take one of {known}")
    return named


def compare(study: Study, rows: Sequence[Row], x: str, y: str, split: str) -> PairedDifference | None:
    """Accuracy of `x` less that of `y` in points, paired by the seeds that both have in all places of the study."""
    data = _Data(study, rows, y)
    return _compare(data, data.with_split(study.places, split), x, split)


def overviews(study: Study, rows: Sequence[Row]) -> list[Sheet]:
    """All places of a study side by side: a table for each split, and one of what the critics knew.

    Of the ends the interquartile means, `*` beside the highest of a place and a count of them at the line's end; a tie
    marks nobody, and a place where one algorithm stands alone counts for nobody. Rows of other cells are left out.
    """
    data = _Data(study, rows)
    ends = [_ends(data, there, split) for split in SPLITS if (there := data.with_split(study.places, split))]
    known = _correlations(data)
    return [*ends, known] if known.lines else ends


class _Data:
    """Those of the rows that are of the study's cells, and the scores in them."""

    def __init__(self, study: Study, rows: Sequence[Row], baseline: str = "") -> None:
        self.study, self.baseline = study, baseline
        wanted = {cell.key for cell in study.cells}
        self.rows: dict[CellKey, Row] = {row_key(row): row for row in rows if row_key(row) in wanted}

    def of(self, place: Place, algorithm: str, split: str) -> dict[int, Row]:
        """Seed -> row with a known accuracy at its end."""
        rows = {seed: self.rows.get((*place, algorithm, seed)) for seed in self.study.names("seed")}
        return {seed: row for seed, row in rows.items() if row is not None and row[f"{split}_true"] is not None}

    def scores(self, places: Sequence[Place], algorithm: str, split: str) -> list[dict[int, float]]:
        """For each place: seed -> accuracy in %."""
        return [
            {seed: 100 * row[f"{split}_true"] for seed, row in self.of(place, algorithm, split).items()}
            for place in places
        ]

    def by_seed(self, places: Sequence[Place], algorithm: str, split: str) -> dict[int, float]:
        """Seed -> its mean over the places, of the seeds that have all of them: a seed's runs share their prompts."""
        scores = self.scores(places, algorithm, split)
        seeds = [seed for seed in self.study.names("seed") if places and all(seed in row for row in scores)]
        return {seed: fmean(row[seed] for row in scores) for seed in seeds}

    def with_split(self, places: Sequence[Place], split: str) -> list[Place]:
        """The places whose task has that split; one without any row is missing, and no reason to forget it."""
        known: dict[str, list[bool]] = {}
        for row in self.rows.values():
            known.setdefault(row["task"], []).append(row[f"{split}_true"] is not None)
        return [place for place in places if any(known.get(place[0], [True]))]


# Lines


def _family(data: _Data, groups: Sequence[Sequence[Place]]) -> list[Sheet]:
    """A sheet for each group of places; the p-values of all of them are corrected together."""
    others = [name for name in data.study.names("algorithm") if name != data.baseline]
    compared = {
        (index, algorithm, split): comparison
        for index, places in enumerate(groups)
        for algorithm in others
        for split in SPLITS
        if (comparison := _compare(data, data.with_split(places, split), algorithm, split)) is not None
    }
    corrected = dict(zip(compared, holm([comparison.p for comparison in compared.values()]), strict=True))
    sheets = []
    for index, places in enumerate(groups):
        lines = []
        for algorithm in data.study.names("algorithm"):
            for split in SPLITS:
                if there := data.with_split(places, split):
                    key = (index, algorithm, split)
                    against = _against(compared.get(key), corrected.get(key), len(data.study.names("seed")))
                    lines.append(_line(data, there, algorithm, split, against))
        sheets.append(Sheet(_title(data, places), _columns(data.baseline), tuple(lines)))
    return sheets


def _compare(data: _Data, places: Sequence[Place], algorithm: str, split: str) -> PairedDifference | None:
    """The differences to the baseline: a seed, not a cell, is the unit."""
    mine, theirs = (data.by_seed(places, name, split) for name in (algorithm, data.baseline))
    seeds = [seed for seed in mine if seed in theirs]
    return paired_difference([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]) if seeds else None


def _columns(baseline: str) -> tuple[str, ...]:
    return (
        *("algorithm", "split", "seeds", "before", "end, IQM [95%]"),
        *(f"beats {baseline} [95%]", f"less {baseline}, paired [95%]", "p (Holm)", "end less peak"),
    )


def _line(
    data: _Data, places: Sequence[Place], algorithm: str, split: str, against: tuple[str, str]
) -> tuple[str, ...]:
    scores = list(data.by_seed(places, algorithm, split).values())
    rows = [row for place in places for row in data.of(place, algorithm, split).values()]
    planned = len(data.study.names("seed"))
    seeds = str(planned) if len(scores) == planned else f"{len(scores)} of {planned}{SHORT}"
    if not scores:
        return (algorithm, split.upper(), seeds, *[NONE] * 6)
    befores = [row[f"{split}_before"] for row in rows if row[f"{split}_before"] is not None]
    return (
        algorithm,
        split.upper(),
        seeds,
        f"{100 * fmean(befores):.1f}" if befores else NONE,
        f"{iqm(scores):.1f} {_interval(_spread(iqm, scores), '.1f')}",
        _chance(data, places, algorithm, split),
        *against,
        f"{100 * fmean(stability(row, split) for row in rows):+.1f}",
    )


def _chance(data: _Data, places: Sequence[Place], algorithm: str, split: str) -> str:
    """The probability of improvement over the baseline, where both have runs."""
    x, y = ([*data.by_seed(places, name, split).values()] for name in (algorithm, data.baseline))
    if algorithm == data.baseline or not x or not y:
        return NONE
    value = probability_of_improvement(x, y)
    return f"{value:.2f} {_interval(_spread(probability_of_improvement, x, y), '.2f')}"


def _against(compared: PairedDifference | None, corrected: float | None, planned: int) -> tuple[str, str]:
    """The paired difference with its interval, and its corrected p-value."""
    if compared is None:
        return NONE, NONE
    short = f" ({compared.pairs} of {planned} pairs{SHORT})" if compared.pairs < planned else ""
    return f"{difference_text(compared)}{short}", f"{corrected:.3f}"


def difference_text(difference: PairedDifference) -> str:
    """`+1.2 [-0.4, +2.8]`."""
    return f"{difference.mean:+.1f} {_interval(Interval(difference.low, difference.high), '+.1f')}"


def _spread(statistic: Callable[..., float], *samples: list[float]) -> Interval:
    """The bootstrap interval; of single runs there is nothing to redraw, and no interval."""
    if all(len(sample) == 1 for sample in samples):
        return Interval(-math.inf, math.inf)
    return bootstrap_interval(statistic, *samples)


def _interval(interval: Interval, form: str) -> str:
    """`[1.2, 3.4]`; without ends, as of a single pair, `[-]`."""
    return f"[{interval.low:{form}}, {interval.high:{form}}]" if math.isfinite(interval.low) else f"[{NONE}]"


def stability(row: Row, split: str) -> float:
    """Accuracy at the end less its highest on the way: 0, or how much was lost again."""
    column = 1 + SPLITS.index(split)
    return row[f"{split}_true"] - max(point[column] for point in row["curve"] if point[column] is not None)


# All places side by side


def _ends(data: _Data, places: Sequence[Place], split: str) -> Sheet:
    algorithms, planned = data.study.names("algorithm"), len(data.study.names("seed"))
    scores = {name: data.scores(places, name, split) for name in algorithms}
    middles = {name: [iqm([*row.values()]) if row else -math.inf for row in scores[name]] for name in algorithms}
    columns_of = list(zip(*middles.values(), strict=True))
    contested = [sum(map(math.isfinite, column)) > 1 for column in columns_of]
    highest = [
        max(column) if contest and column.count(max(column)) == 1 else None
        for column, contest in zip(columns_of, contested, strict=True)
    ]
    lines = []
    for name in algorithms:
        best = [mine == top for mine, top in zip(middles[name], highest, strict=True)]
        cells = [
            NONE if not row else f"{middle:.1f}{'*' * is_best}{SHORT * (len(row) < planned)}"
            for row, middle, is_best in zip(scores[name], middles[name], best, strict=True)
        ]
        lines.append((name, *cells, f"{sum(best)} of {sum(contested)}" if any(contested) else NONE))
    columns = ("algorithm", *map(", ".join, places), "highest")
    return Sheet(f"end, IQM in %: {split.upper()}", columns, tuple(lines))


def _correlations(data: _Data) -> Sheet:
    places, lines = data.study.places, []
    for name in data.study.names("algorithm"):
        cells = []
        for place in places:
            rows = [data.rows.get((*place, name, seed)) for seed in data.study.names("seed")]
            known = [row["corr"] for row in rows if row is not None and row.get("corr") is not None]
            cells.append(f"{fmean(known):+.2f}" if known else NONE)
        if any(cell != NONE for cell in cells):
            lines.append((name, *cells))
    title = "correlation of V with the true outcome, last fifth of the steps, mean over runs"
    return Sheet(title, ("algorithm", *map(", ".join, places)), tuple(lines))


# Words


def _title(data: _Data, places: Sequence[Place]) -> str:
    cells = [cell for cell in data.study.cells if (cell.task, cell.noise) in places]
    models = [cell.config.model for cell in cells]
    starts = {f"checker dial {m.checker:g}" if m.path == "embedded" else f"model {m.path}" for m in models}
    where = f"{places[0][0]}, {places[0][1]}" if len(places) == 1 else f"all {len(places)} pairs of task and noise"
    return f"{where}; {', '.join(sorted(starts))}"


def _accuracy(tasks: Sequence[str], blind: Collection[str]) -> str:
    """What the tables hold, and by whom it is judged."""
    by_reward = [task for task in tasks if task in blind]
    if by_reward and len(by_reward) < len(tasks):
        return f"True greedy accuracy, that of {', '.join(by_reward)} {BY_REWARD},"
    return judged("Greedy accuracy", not by_reward)


def _notes(data: _Data, accuracy: str, foreign: int, averaged: bool) -> tuple[str, ...]:
    end = "mean over the evaluations of the last quarter" if averaged else "last evaluation"
    notes = [
        f"{accuracy} on held-out prompts in %; over all places a seed's mean. before: mean over runs. end: "
        f"the {end}; interquartile mean over seeds with its bootstrap interval. beats: chance that a seed beats one of "
        f"{data.baseline}.",
        "paired: mean difference by seed with Student's interval, not corrected for many comparisons. p: sign-flip "
        "test, exact for up to 16 seeds, corrected by Holm over all lines of the tables of one task and noise, and "
        "over all lines of the pooled table by itself.",
        "*: the highest of its place in the tables of all places.",
        f"end less peak: mean over runs of the {end} less the highest evaluation, the one before training included.",
    ]
    if any(cell.config.model.path == "embedded" for cell in data.study.cells):
        notes.append(
            "checker dial: how much the starting model was taught about checking solutions; above 0 it is an "
            "assumption, and 0 drops it."
        )
    missing = [cell_id(cell.key) for cell in data.study.cells if cell.key not in data.rows]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        notes.append(
            f"{SHORT.strip()} {len(missing)} of {len(data.study.cells)} cells have no row; lines marked so are not "
            f"the planned ones: {', '.join(missing[:LISTED])}{more}."
        )
    if unknown := [row["unknown"] for row in data.rows.values() if "unknown" in row]:
        notes.append(
            f"{sum(unknown):,} held-out answers of {len(unknown)} runs had no reward at the end and count in no "
            "accuracy; if it is the wrong ones, the accuracy flatters."
        )
    if foreign:
        notes.append(f"{foreign} rows of cells that are not chosen here are left out.")
    return tuple(notes)


# Output


def print_report(report: Report, console: Console) -> None:
    for sheet in report.sheets:
        table = Table(title=sheet.title)
        for column in sheet.columns:
            table.add_column(column, justify="left" if column in ("algorithm", "split") else "right")
        for line in sheet.lines:
            table.add_row(*line)
        console.print(table)
    for note in report.notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def to_markdown(report: Report) -> str:
    """The same tables for a Markdown page."""
    parts = []
    for sheet in report.sheets:
        rule = ["---" if column in ("algorithm", "split") else "---:" for column in sheet.columns]
        lines = [f"| {' | '.join(cells)} |" for cells in (sheet.columns, rule, *sheet.lines)]
        parts.append("\n".join([f"**{sheet.title}**", "", *lines]))
    return "\n\n".join([*parts, *report.notes]) + "\n"
