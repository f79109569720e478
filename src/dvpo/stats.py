"""The few statistics that a fair comparison of noisy runs needs.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice": interquartile
mean, stratified bootstrap intervals, probability of improvement. Wilson 1927, and Clopper and Pearson 1934: the
interval of a proportion, in the mean as long as its level says, and never shorter.
Fisher 1935, "The Design of Experiments": the sign-flip test of paired runs. Holm 1979: many comparisons at once.

Scores of several runs come as rows: one row for each stratum (a task, a noise level), one entry for each run
(a seed). Rows may differ in length; a flat list is one row.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EXACT_PAIRS = 16
"""So many pairs are flipped in every possible way (65,536 of them); more are flipped at random."""

RANDOM_FLIPS = 20_000

MOST_DRAWN = 2**20
"""So many scores are redrawn at once."""

Scores = Sequence[float] | Sequence[Sequence[float]] | NDArray


class Interval(NamedTuple):
    """A confidence interval, ends included."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """The mean of x - y over pairs, its confidence interval, and the p-value of "x and y are exchangeable"."""

    mean: float
    low: float
    high: float
    p: float
    pairs: int


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


@lru_cache(maxsize=4096)
def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """The exact interval of a proportion: it covers the truth at least as often as its level says, whatever that is.

        P(X >= successes | low) = (1 - level) / 2 = P(X <= successes | high),   X ~ Binomial(trials, .)

    Source: Clopper and Pearson 1934, "The use of confidence or fiducial limits", Biometrika 26.

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
    miss = (1 - level) / 2
    low = 0.0 if successes == 0 else _share_reaching(successes, trials, miss)
    # Failures are successes of the other coin.
    high = 1.0 if successes == trials else 1 - _share_reaching(trials - successes, trials, miss)
    return Interval(low, high)


def _share_reaching(successes: int, trials: int, chance: float) -> float:
    """The p with P(X >= successes) = chance for X ~ Binomial(trials, p), which grows with p: bisection."""
    counts = range(successes, trials + 1)
    log_ways = np.array([math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in counts])
    hits = np.arange(successes, trials + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        reached = float(np.exp(log_ways + hits * math.log(p) + (trials - hits) * math.log1p(-p)).sum())
        low, high = (p, high) if reached < chance else (low, p)
    return (low + high) / 2


def iqm(scores: Scores) -> float:
    """Interquartile mean of all entries: floor(n/4) are dropped at each end, the rest is averaged.

    It wastes less of the data than the median and, unlike the mean, is not moved by one lucky run.
    """
    return float(_iqm(_rows(scores)))


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """How likely a run of x beats a run of y in the same row, averaged over rows; ties count half.

        mean over rows of  mean_ij [ 1{x_i > y_j} + 1{x_i = y_j} / 2 ]

    Raises:
        ValueError: if x and y differ in their number of rows.
    """
    x_rows, y_rows = _rows(x), _rows(y)
    if len(x_rows) != len(y_rows):
        raise ValueError(f"x and y must have the same rows, got {len(x_rows)} and {len(y_rows)}")
    return float(_improvement(x_rows, y_rows))


# The same of rows [..., n] that hold a run in each entry of their last axis: one value for each leading index.


def _iqm(rows: list[NDArray]) -> NDArray:
    pooled = np.sort(np.concatenate(rows, axis=-1), axis=-1)
    dropped = pooled.shape[-1] // 4
    return pooled[..., dropped : pooled.shape[-1] - dropped].mean(-1)


def _improvement(x_rows: list[NDArray], y_rows: list[NDArray]) -> NDArray:
    return np.mean([_beats(x, y) for x, y in zip(x_rows, y_rows, strict=True)], axis=0)


def _beats(x: NDArray, y: NDArray) -> NDArray:
    return ((np.sign(x[..., :, None] - y[..., None, :]) + 1) / 2).mean((-2, -1))


_VECTORISED: dict[Callable[..., float], Callable[..., NDArray]] = {iqm: _iqm, probability_of_improvement: _improvement}


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
        ValueError: if a sample or a row is empty, a score is not finite, or the level is out of range.
    """
    _check_level(level)
    rows_of = [_rows(sample) for sample in samples]
    generator = np.random.default_rng(seed)
    size = sum(len(row) for rows in rows_of for row in rows)
    values: list[float] = []
    while len(values) < resamples:
        # Many redraws at once are what one after the other would be, fifty times as fast; so many as memory likes.
        many = min(resamples - len(values), max(1, MOST_DRAWN // size))
        redrawn = _redrawn(rows_of, many, generator)
        if statistic in _VECTORISED:
            values += _VECTORISED[statistic](*redrawn).tolist()
        else:
            values += [statistic(*[[row[i] for row in rows] for rows in redrawn]) for i in range(many)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _redrawn(rows_of: list[list[NDArray]], many: int, generator: np.random.Generator) -> list[list[NDArray]]:
    """The samples with each row [n] redrawn `many` times: [many, n]."""
    lengths = [len(row) for rows in rows_of for row in rows]
    drawn = generator.integers(0, np.tile(np.repeat(lengths, lengths), (many, 1)))
    places = iter(np.split(drawn, np.cumsum(lengths)[:-1], axis=1))
    return [[row[next(places)] for row in rows] for rows in rows_of]


def paired_difference(x: Sequence[float], y: Sequence[float], level: float = 0.95) -> PairedDifference:
    """Mean difference of runs paired by their seed, with Student's interval and the sign-flip test's p-value.

        mean(d) +- t sd(d) / sqrt(n),  d_i = x_i - y_i, sd with n - 1, t the quantile of n - 1 degrees of freedom

    The interval is Student's and not the bootstrap's, which is far too short for the five or twelve seeds that
    studies have. With one pair it is the whole line.

    Args:
        x, y: scores; entry i of both belongs to one seed.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: if x and y differ in length, are empty or not finite, or the level is out of range.
    """
    _check_level(level)
    if len(x) != len(y) or not len(x):
        raise ValueError(f"x and y must have as many entries, one pair at least, got {len(x)} and {len(y)}")
    difference = np.asarray(x, dtype=float) - np.asarray(y, dtype=float)
    _check_finite("x - y", difference)
    pairs, mean, half = len(difference), float(difference.mean()), math.inf
    if pairs > 1:
        half = student_quantile(pairs - 1, level) * float(difference.std(ddof=1)) / math.sqrt(pairs)
    return PairedDifference(mean, mean - half, mean + half, sign_flip_test(difference), pairs)


def sign_flip_test(differences: Sequence[float] | NDArray) -> float:
    """Two-sided p-value of paired differences under the hypothesis that each could as well have the other sign.

        p = share of sign vectors s with |sum_i s_i d_i| >= |sum_i d_i|

    Exact (all 2^n vectors) up to `EXACT_PAIRS` pairs: n pairs cannot give less than 2 / 2^n, so that five seeds
    never reach .05. Beyond, `RANDOM_FLIPS` random vectors and the observed one, p = (1 + hits) / (1 + flips), the same
    for the same differences.

    Args:
        differences: one for each pair.

    Raises:
        ValueError: if there is no difference, or one is not finite.
    """
    size = np.abs(np.asarray(differences, dtype=float))
    pairs = len(size)
    if pairs == 0:
        raise ValueError("differences must hold at least one number")
    _check_finite("differences", size)
    # Equal sums may differ in their last digit, for they are added up in another order.
    threshold = abs(float(np.sum(differences))) - 1e-9 * float(size.sum())
    if pairs <= EXACT_PAIRS:
        sums = np.zeros(1)
        for value in size:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= threshold))
    signs = np.random.default_rng(0).integers(0, 2, size=(RANDOM_FLIPS, pairs), dtype=np.int8) * 2 - 1
    return float((1 + np.sum(np.abs(signs @ size) >= threshold)) / (1 + RANDOM_FLIPS))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the order given.

        adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)),  p_(1) <= ... <= p_(m)

    Rejecting what stays below .05 errs even once with a chance of at most .05, whatever the tests' dependence.

    Raises:
        ValueError: if a p-value does not lie in [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p_values must lie in 0..1, got {list(p_values)}")
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def student_quantile(freedom: int, level: float) -> float:
    """The t with P(|T| <= t) = level for Student's T with a whole number of degrees of freedom.

    With theta = atan(t / sqrt(freedom)) that chance is a finite sum (Abramowitz and Stegun 26.7.3-4), which grows
    with theta: bisection.

    Raises:
        ValueError: if there is no degree of freedom, or the level is out of range.
    """
    _check_level(level)
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(freedom, middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_share(freedom: int, theta: float) -> float:
    """P(|T| <= sqrt(freedom) tan(theta))."""
    odd = freedom % 2
    term = math.sin(theta) * (math.cos(theta) if odd else 1.0)
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(theta) ** 2 * k / (k + 1)
    return 2 / math.pi * (theta + total) if odd else total


def _rows(scores: Scores) -> list[NDArray]:
    flat = len(scores) > 0 and np.ndim(scores[0]) == 0
    rows = [np.asarray(row, dtype=float) for row in ([scores] if flat else scores)]
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise ValueError(f"scores must be rows of at least one number each, got {scores!r}")
    for row in rows:
        _check_finite("scores", row)
    return rows


def _check_finite(name: str, numbers: NDArray) -> None:
    """NaN sorts as the best run and makes no sum reach a threshold: it would pass for a result."""
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, got {numbers.tolist()}: leave runs without a score out")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
