"""The few statistics that a fair comparison of noisy runs needs.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice": interquartile
mean, stratified bootstrap intervals, probability of improvement. Chen et al. 2021, "Evaluating Large Language
Models Trained on Code": pass@k. Yao et al. 2024, "tau-bench": pass^k. Wilson 1927: the interval of a proportion.

Scores of several runs come as rows: one row for each stratum (a task, a noise level), one entry for each run
(a seed). Rows may differ in length; a flat list is one row.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = Sequence[float] | Sequence[Sequence[float]] | NDArray


class Interval(NamedTuple):
    """A confidence interval, ends included."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; sound near 0 and 1, where the textbook one collapses.

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),  p = successes / n, z = Phi^-1((1+level)/2)

    Args:
        successes: how many of the trials succeeded.
        trials: number of independent trials n; with none the interval is [0, 1].
        level: coverage, in (0, 1).

    Raises:
        ValueError: if the counts or the level are out of range.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie in 0..trials, got {successes} of {trials}")
    _check_level(level)
    if trials == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    # At 0 and n successes an end is 0 or 1 exactly; only rounding says otherwise.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return Interval(low, high)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """The chance that k samples hold a correct one, unbiased from n >= k samples (Chen et al. 2021).

        pass@k = 1 - C(n - c, k) / C(n, k)

    Args:
        num_correct: correct samples c of one prompt.
        num_samples: samples n of that prompt.
        k: samples allowed, 1..n.

    Raises:
        ValueError: if a count is out of range.
    """
    _check_counts(num_correct, num_samples, k)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_hat_k(num_correct: int, num_samples: int, k: int) -> float:
    """The chance that k samples are *all* correct, unbiased from n >= k samples (Yao et al. 2024, tau-bench).

        pass^k = C(c, k) / C(n, k)

    Args:
        num_correct: correct samples c of one prompt.
        num_samples: samples n of that prompt.
        k: samples that have to succeed, 1..n.

    Raises:
        ValueError: if a count is out of range.
    """
    _check_counts(num_correct, num_samples, k)
    return math.comb(num_correct, k) / math.comb(num_samples, k)


def iqm(scores: Scores) -> float:
    """Interquartile mean of all entries: floor(n/4) are dropped at each end, the rest is averaged.

    It wastes less of the data than the median and, unlike the mean, is not moved by one lucky run.
    """
    pooled = np.sort(np.concatenate(_rows(scores)))
    dropped = len(pooled) // 4
    return float(pooled[dropped : len(pooled) - dropped].mean())


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """How likely a run of x beats a run of y in the same row, averaged over rows; ties count half.

        mean over rows of  mean_ij [ 1{x_i > y_j} + 1{x_i = y_j} / 2 ]

    Raises:
        ValueError: if x and y differ in their number of rows.
    """
    x_rows, y_rows = _rows(x), _rows(y)
    if len(x_rows) != len(y_rows):
        raise ValueError(f"x and y must have the same rows, got {len(x_rows)} and {len(y_rows)}")
    return float(np.mean([_beats(x_row, y_row) for x_row, y_row in zip(x_rows, y_rows, strict=True)]))


def _beats(x: NDArray, y: NDArray) -> float:
    return float(((np.sign(x[:, None] - y[None, :]) + 1) / 2).mean())


def bootstrap_interval(
    statistic: Callable[..., float],
    *samples: Scores,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `statistic(*samples)` under a stratified bootstrap.

    Every row of every sample is redrawn from itself with replacement, so that no stratum gains or loses
    weight by chance: `bootstrap_interval(iqm, scores)`, `bootstrap_interval(probability_of_improvement, x,
    y)`. Runs paired by seed are compared by their differences, as one sample.

    Args:
        statistic: called with one list of rows for each sample.
        samples: scores, as the module says.
        level: coverage, in (0, 1).
        resamples: number of redraws.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: if a sample or a row is empty, or the level is out of range.
    """
    _check_level(level)
    rows_of = [_rows(sample) for sample in samples]
    generator = np.random.default_rng(seed)
    values = [
        statistic(*[[generator.choice(row, size=len(row)) for row in rows] for rows in rows_of])
        for _ in range(resamples)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _rows(scores: Scores) -> list[NDArray]:
    flat = len(scores) > 0 and np.ndim(scores[0]) == 0
    rows = [np.asarray(row, dtype=float) for row in ([scores] if flat else scores)]
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise ValueError(f"scores must be rows of at least one number each, got {scores!r}")
    return rows


def _check_counts(num_correct: int, num_samples: int, k: int) -> None:
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must lie in 0..num_samples, got {num_correct} of {num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must lie in 1..num_samples, got k = {k} with {num_samples} samples")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
