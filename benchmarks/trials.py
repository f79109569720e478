"""What the trials of docs/protocol.md say: the best of each row, and how far two rows' runs of one seed scatter.

    python benchmarks/trials.py

A trial's score is the mean of ID and OOD over its runs, each the mean over the last quarter of the run. The deviation
is that of the difference of two rows at the same seed, each at its best trial: per cell, and of a seed's mean over the
cells. Two seeds give one degree of freedom; it is pooled over all pairs of rows, which are not independent.
"""

import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from dvpo.study import Study
from dvpo.study_results import Row

Place = tuple[str, int]
"""Task, whose noise is its own, and seed."""


def main() -> None:
    from noise_results import TRIALS, rows_of  # which shows these lines on its page

    *lines, in_domain, out = summary(*rows_of(TRIALS))
    print("\n".join([*lines, in_domain, out]))
    spread = [float(re.search(r"in one cell ([0-9.]+)", line)[1]) for line in (in_domain, out)]
    for lead in (2.0, 3.0):
        share = highest(lead, spread)
        print(f"{lead:g} points ahead in every cell: highest in 8 of 9, ID and OOD, in {share:.0%} of studies")


def summary(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    """A table of every trial that has all its runs, the best of a row first, and the deviations, line by line."""
    names, tasks, seeds = (study.names(axis) for axis in ("algorithm", "task", "seed"))
    scores: dict[str, dict[Place, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        scores[row["algorithm"]][row["task"], row["seed"]] = (100 * row["id_true"], 100 * row["ood_true"])
    yield f"| row | trial | {' | '.join(tasks)} | mean |"
    yield "|---|---|" + "---|" * (len(tasks) + 1)
    best = []
    for family, trials in itertools.groupby(names, key=family_of):
        done = {name: mean_of(scores[name]) for name in trials if len(scores[name]) == len(tasks) * len(seeds)}
        best += [max(done, key=done.__getitem__)] if done else []
        for name, score in sorted(done.items(), key=lambda item: -item[1]):
            cells = [" / ".join(f"{mean:.1f}" for mean in means) for means in by_task(scores[name])]
            yield f"| {family} | {name.rpartition('_')[2]} | {' | '.join(cells)} | {score:.1f} |"
    for split, which in (("ID", 0), ("OOD", 1)):
        in_cell, of_seed = deviations({name: scores[name] for name in best}, seeds, which)
        yield f"\n{split}: paired deviation in one cell {in_cell:.1f}, of a seed's mean over the cells {of_seed:.1f}"


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
