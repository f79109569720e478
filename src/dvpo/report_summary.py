"""The table at the head of a report: a line for each series, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from dvpo.judgement import judged
from dvpo.plain_text import interval
from dvpo.report_data import Place, Run, Series
from dvpo.report_panels import over_seeds
from dvpo.report_words import SPLITS, ends, knows_truth

NONE = "-"


@dataclass(frozen=True)
class SummaryTable:
    """Cells as text."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str


def summary_table(place: Place) -> SummaryTable:
    """Accuracy (true where the truth is known) before and after, worth of the rewards, faults and time, by series."""
    columns = ["", "seeds", "ID before", "ID after", "OOD before", "OOD after", "reward accuracy", "faults", "seconds"]
    several = any(len(series.runs) > 1 for series in place.series)
    greedy = judged("Greedy accuracy", knows_truth(place.runs))
    note = (
        f"{greedy} on held-out prompts in %; in brackets 95% intervals, over seeds (Student) "
        "where there are several, else over the prompts of the one run (Wilson), which says nothing about seeds."
        if several
        else f"{greedy} on held-out prompts in %; in brackets 95% Wilson intervals over the prompts, which "
        "say nothing about other seeds."
    )
    lines = [_line(series) for series in place.series]
    known = [index for index in range(len(columns)) if any(line[index] != NONE for line in lines)]
    return SummaryTable(place.title, [columns[i] for i in known], [[line[i] for i in known] for line in lines], note)


def _line(series: Series) -> list[str]:
    accuracies = [value for run in series.runs for _, value in run.curve("reward/accuracy")]
    faults = sum(len(run.reward_faults) for run in series.runs)
    trained = any(run.steps for run in series.runs)
    return [
        series.name,
        str(len(series.runs)),
        *(_end(series.runs, split, index) for split, _ in SPLITS for index in (0, 1)),
        f"{100 * fmean(accuracies):.1f}%" if accuracies else NONE,
        str(faults) if trained else NONE,
        f"{sum(run.seconds for run in series.runs):,.0f}" if trained else NONE,
    ]


def _end(runs: Sequence[Run], split: str, index: int) -> str:
    """`45.3 [39, 51]`: the first (0) or last (1) accuracy."""
    key = f"eval/{split}/accuracy"
    known = [run for run in runs if ends(run, split)]
    if not known:
        return NONE
    if len(known) == 1:
        step, value = known[0].curve(key)[-1 if index else 0]
        return interval(value, *(dict(known[0].curve(f"{key}{end}")).get(step) for end in ("_low", "_high")))
    pairs = [pair for run in known if (pair := ends(run, split))]
    low, middle, high = over_seeds([[(0.0, pair[index])] for pair in pairs])
    return interval(middle[0][1], max(low[0][1], 0.0), min(high[0][1], 1.0))
