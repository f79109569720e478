"""What the trials of docs/protocol.md say: the best of each row, and how far two rows' runs of one seed scatter.

    python benchmarks/trials.py

A trial's score is the mean of ID and OOD over its runs, each the mean over the last quarter of the run. The deviation
is that of the difference of two rows at the same seed, each at its best trial: per cell, and of a seed's mean over the
cells. Two seeds give one degree of freedom; it is pooled over all pairs of rows, which are not independent.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from noise_parts import TRIALS, rows_of

from dvpo.study import Study
from dvpo.study_results import Row

Place = tuple[str, int]
"""Task, whose noise is its own, and seed."""


def main() -> None:
    study, rows = rows_of(TRIALS)
    print("\n".join(summary(study, rows)))
    best, seeds = best_trials(study, scores_of(rows)), study.names("seed")
    spread = [deviations(best, seeds, which)[0] for which in (0, 1)]
    for lead in (2.0, 3.0):
        share = highest(lead, spread)
        print(f"{lead:g} points ahead in every cell: highest in 8 of 9, ID and OOD, in {share:.0%} of studies")


def summary(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    """A table of every trial that has all its runs, the best of a row first, and the deviations, line by line."""
    tasks, scores = study.names("task"), scores_of(rows)
    yield f"| row | trial | {' | '.join(tasks)} | mean |"
    yield "|---|---|" + "---|" * (len(tasks) + 1)
    for family, done in ranked(study, scores):
        for name, score in done:
            cells = [" / ".join(f"{mean:.1f}" for mean in means) for means in by_task(scores[name])]
            yield f"| {family} | {name.rpartition('_')[2]} | {' | '.join(cells)} | {score:.1f} |"
    for split, which in (("ID", 0), ("OOD", 1)):
        in_cell, of_seed = deviations(best_trials(study, scores), study.names("seed"), which)
        yield f"\n{split}: paired deviation in one cell {in_cell:.1f}, of a seed's mean over the cells {of_seed:.1f}"


Scores = dict[str, dict[Place, tuple[float, float]]]
"""Trial -> task and seed -> ID and OOD in %."""


def scores_of(rows: Sequence[Row]) -> Scores:
    scores: Scores = defaultdict(dict)
    for row in rows:
        scores[row["algorithm"]][row["task"], row["seed"]] = (100 * row["id_true"], 100 * row["ood_true"])
    return scores


def ranked(study: Study, scores: Scores) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Of each row its trials that have all their runs with their scores, the best first."""
    runs = len(study.names("task")) * len(study.names("seed"))
    for family, trials in itertools.groupby(study.names("algorithm"), key=family_of):
        done = [(name, mean_of(scores[name])) for name in trials if len(scores[name]) == runs]
        yield family, sorted(done, key=lambda item: -item[1])


def best_trials(study: Study, scores: Scores) -> Scores:
    return {done[0][0]: scores[done[0][0]] for _, done in ranked(study, scores) if done}


def family_of(name: str) -> str:
    return name.rpartition("_")[0]


def mean_of(runs: dict[Place, tuple[float, float]]) -> float:
    return statistics.fmean(value for pair in runs.values() for value in pair)


def by_task(runs: dict[Place, tuple[float, float]]) -> list[tuple[float, float]]:
    """ID and OOD, means over the seeds, of each task."""
    tasks = dict.fromkeys(task for task, _ in runs)
    return [
        tuple(statistics.fmean(pair[i] for (at, _), pair in runs.items() if at == task) for i in (0, 1))
        for task in tasks
    ]


def deviations(
    scores: dict[str, dict[Place, tuple[float, float]]], seeds: list[int], which: int
) -> tuple[float, float]:
    """Of paired differences between two seeds: root of the mean of (d_1 - d_2)^2 / 2."""
    cells, means = [], []
    for one, other in itertools.combinations(scores.values(), 2):
        tasks = sorted({task for task, _ in one})
        gaps = [[one[task, seed][which] - other[task, seed][which] for seed in seeds] for task in tasks]
        cells += [statistics.variance(gap) for gap in gaps]
        means.append(statistics.variance([statistics.fmean(column) for column in zip(*gaps, strict=True)]))
    return statistics.fmean(cells) ** 0.5, statistics.fmean(means) ** 0.5


def highest(lead: float, spread: Sequence[float], studies: int = 2000) -> float:
    """How often a row that is truly `lead` points ahead of six equal ones has the highest interquartile mean in eight
    of nine independent cells, ID and OOD, with twelve seeds; `spread`: deviations of two rows' difference in a cell."""
    generator, hits = np.random.default_rng(0), np.ones(studies, dtype=bool)
    for deviation in spread:
        ends = generator.normal(scale=deviation / 2**0.5, size=(studies, 9, 7, 12))
        middles = np.sort(ends, axis=-1)[..., 3:9].mean(-1)
        hits &= (middles[..., 0] + lead > middles[..., 1:].max(-1)).sum(-1) >= 8
    return float(hits.mean())


if __name__ == "__main__":
    main()
