"""Intervals, pass@k and the statistics of several runs, against hand arithmetic and simulation."""

import itertools

import numpy as np
import pytest
import scipy.stats

from dvpo.stats import (
    bootstrap_interval,
    clopper_pearson,
    holm,
    iqm,
    paired_difference,
    probability_of_improvement,
    sign_flip_test,
    student_quantile,
    wilson_interval,
)


def test_wilson_interval_equals_hand_arithmetic() -> None:
    # 8 of 10 at 95%: z = 1.959964, z^2 = 3.841459.
    # centre = .8 + 3.841459/20 = .992073
    # half = z sqrt(.8*.2/10 + 3.841459/400) = 1.959964 sqrt(.025604) = .313615
    # scale = 1 + .3841459: (.992073 -+ .313615) / 1.3841459 = .490162, .943318
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)


def test_wilson_interval_keeps_a_width_where_the_textbook_interval_has_none() -> None:
    # 0 of 10: lower end 0, upper z^2/(n + z^2) = 3.841459/13.841459 = .277533; 10 of 10 mirrors it
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(10, 10).high == 1.0
    assert wilson_interval(10, 10).low == pytest.approx(1 - 0.277533, abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_wilson_interval_covers_the_truth_as_often_as_it_says(probability: float) -> None:
    draws = np.random.default_rng(0).binomial(60, probability, size=4000)
    intervals = {int(s): wilson_interval(int(s), 60, level=0.9) for s in np.unique(draws)}
    covered = np.mean([intervals[int(s)].low <= probability <= intervals[int(s)].high for s in draws])
    assert 0.86 < covered < 0.95  # a count is discrete: .9 exactly cannot be had


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("trials", [1, 7, 40, 3000])
def test_clopper_pearson_equals_scipys_exact_interval(trials: int, level: float) -> None:
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        expected = scipy.stats.binomtest(successes, trials).proportion_ci(level, method="exact")
        assert clopper_pearson(successes, trials, level) == pytest.approx(tuple(expected), abs=1e-9)


def test_clopper_pearson_never_covers_less_than_its_level_where_wilson_does() -> None:
    # The exact coverage at n = 40: the binomial chance of all counts whose interval holds p. Wilson's dips below.
    def coverage(interval, p: float) -> float:
        holds = [k for k in range(41) if interval(k, 40).low <= p <= interval(k, 40).high]
        return float(scipy.stats.binom.pmf(holds, 40, p).sum())

    shares = np.linspace(0, 1, 101)
    assert min(coverage(clopper_pearson, p) for p in shares) >= 0.95
    assert min(coverage(wilson_interval, p) for p in shares) < 0.95


def test_clopper_pearson_without_trials_is_everything_and_refuses_impossible_counts() -> None:
    assert clopper_pearson(0, 0) == (0, 1)
    assert clopper_pearson(0, 1, 0.9) == pytest.approx((0, 0.95))  # (1 - high) = .05
    with pytest.raises(ValueError, match="5 of 3"):
        clopper_pearson(5, 3)
    with pytest.raises(ValueError, match="level"):
        clopper_pearson(1, 3, 1.0)


def test_iqm_drops_a_quarter_at_each_end_over_all_rows() -> None:
    # Sorted 0 1 2 3 4 7 8 100: floor(8/4) = 2 dropped at each end, (2 + 3 + 4 + 7)/4 = 4.
    assert iqm([[100, 2, 3, 1], [0, 4, 7, 8]]) == 4.0
    # Three entries: none dropped, (1 + 2 + 6)/3 = 3. Ragged rows are pooled.
    assert iqm([1, 2, 6]) == 3.0
    assert iqm([[1.0], [2.0, 6.0]]) == 3.0


def test_probability_of_improvement_counts_ties_half_and_weighs_rows_alike() -> None:
    # Row 1: pairs (1,1) tie, (1,0) win, (3,1) win, (3,0) win: 3.5/4.  Row 2: one pair, lost: 0.  Mean .4375.
    assert probability_of_improvement([[1, 3], [0]], [[1, 0], [2]]) == pytest.approx(0.4375)
    x, y = [0.1, 0.5, 0.9], [0.2, 0.5]
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1.0)


def test_bootstrap_interval_is_seeded() -> None:
    scores = [[0.1, 0.4, 0.2, 0.9], [0.7, 0.3, 0.8, 0.5]]
    first = bootstrap_interval(iqm, scores, resamples=200, seed=3)
    assert first == bootstrap_interval(iqm, scores, resamples=200, seed=3)
    assert first != bootstrap_interval(iqm, scores, resamples=200, seed=4)


def test_bootstrap_interval_is_stratified_so_differences_between_rows_add_no_width() -> None:
    # Rows without spread, far apart: every stratified redraw has the same mean. Pooled redraws would differ.
    rows = [[0.0, 0.0, 0.0], [10.0, 10.0, 10.0]]
    mean = lambda sample: float(np.mean(np.concatenate(sample)))  # noqa: E731
    assert bootstrap_interval(mean, rows, resamples=100) == (5.0, 5.0)
    low, high = bootstrap_interval(mean, np.ravel(rows), resamples=100)
    assert high - low > 3


def test_bootstrap_interval_of_a_mean_covers_the_truth() -> None:
    generator = np.random.default_rng(1)
    mean = lambda sample: float(sample[0].mean())  # noqa: E731
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(mean, generator.normal(size=40), level=0.9, resamples=300)
        hits += low <= 0.0 <= high
    # 200 trials at .9: a standard error of .021; the percentile interval is a little short at n = 40.
    assert 0.83 < hits / 200 < 0.96


def test_redraws_taken_together_are_those_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = [[1.0, 5.0, 2.0], [0.0, 3.0, 9.0, 4.0, 4.5]], [[2.0, 2.5], [1.0, 0.5, 3.5]]
    together = bootstrap_interval(iqm, x), bootstrap_interval(probability_of_improvement, x, y)
    monkeypatch.setattr("dvpo.stats._VECTORISED", {})
    monkeypatch.setattr("dvpo.stats.MOST_DRAWN", 100)
    one_by_one = bootstrap_interval(iqm, x), bootstrap_interval(probability_of_improvement, x, y)
    np.testing.assert_allclose(together, one_by_one, rtol=1e-12)


def test_bootstrap_interval_takes_statistics_of_two_samples() -> None:
    low, high = bootstrap_interval(probability_of_improvement, [[1, 2, 3]], [[-1, 0, 0]], resamples=50)
    assert (low, high) == (1.0, 1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(5, 4),
        lambda: wilson_interval(1, 4, level=95),
        lambda: iqm([]),
        lambda: iqm([[1.0], []]),
        lambda: probability_of_improvement([[1.0]], [[1.0], [2.0]]),
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: paired_difference([], []),
        lambda: sign_flip_test([]),
        lambda: holm([0.5, 1.5]),
        lambda: student_quantile(0, 0.95),
    ],
)
def test_arguments_out_of_range_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"must (lie|be|have|hold)"):
        call()


# Paired runs


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_run_without_a_score_is_refused_and_does_not_count_as_the_best(bad: float) -> None:
    # Unrefused: NaN sorts last, so that iqm drops it as the best run, and reaches no threshold, so that p is 0.
    for call in (
        lambda: iqm([0.1, 0.2, 0.3, bad]),
        lambda: paired_difference([0.1, bad], [0.0, 0.0]),
        lambda: sign_flip_test([0.1, -0.2, bad]),
        lambda: bootstrap_interval(iqm, [0.1, bad]),
    ):
        with pytest.raises(ValueError, match=r"must be finite.*leave runs without a score out"):
            call()


def test_paired_difference_equals_hand_arithmetic() -> None:
    # d = 1 2 3: mean 2, sd 1, t(2 degrees) = .95 sqrt(2 / (1 - .95^2)) = 4.302653, half = t / sqrt(3) = 2.484138.
    # The sign-flip test: +++ and --- of 8 reach a sum of 6.
    result = paired_difference([3, 5, 7], [2, 3, 4])
    assert result == pytest.approx((2.0, -0.484138, 4.484138, 0.25, 3), abs=1e-6)
    assert paired_difference([1.0], [0.5]) == (0.5, -np.inf, np.inf, 1.0, 1)
    assert paired_difference([1.0, 2.0], [0.5, 1.5])[:3] == (0.5, 0.5, 0.5)


def test_pairing_takes_out_what_seeds_share_and_the_unpaired_interval_would_be_wider() -> None:
    seeds = np.array([10.0, 50.0, 90.0, 30.0])
    better = seeds + np.array([1.0, 1.2, 0.9, 1.1])
    paired = paired_difference(better, seeds)
    assert paired.low > 0
    unpaired = paired_difference(better, seeds[::-1])
    assert unpaired.mean == pytest.approx(paired.mean)
    assert unpaired.low < 0


def test_the_student_interval_covers_the_truth_for_five_seeds_where_the_bootstrap_does_not() -> None:
    samples = np.random.default_rng(0).normal(size=(400, 5))
    student = np.mean([d.low <= 0 <= d.high for d in (paired_difference(s, np.zeros(5)) for s in samples)])
    mean = lambda sample: float(sample[0].mean())  # noqa: E731
    intervals = [bootstrap_interval(mean, sample, resamples=200) for sample in samples]
    bootstrap = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.92 < student < 0.98  # a standard error of .011
    assert bootstrap < 0.9


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 11, 12, 59, 200])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_student_quantile_equals_scipy(freedom: int, level: float) -> None:
    assert student_quantile(freedom, level) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_sign_flip_test_counts_all_sign_vectors_that_reach_the_sum() -> None:
    # |sum| of 1 -2 4 is 3. Of 8 vectors: +-(1+2+4) 7, +-(-1+2+4) 5, +-(1-2+4) 3, +-(1+2-4) 1: 6 reach it.
    assert sign_flip_test([1, -2, 4]) == 0.75
    # A zero has no sign; equal halves sum to 0, and everything reaches that.
    assert sign_flip_test([1, 0, 2, 3]) == 0.25
    assert sign_flip_test([1, -1]) == 1.0
    assert sign_flip_test([0, 0]) == 1.0
    # n of one sign: 2 / 2^n, whatever rounding does to sums in another order.
    assert sign_flip_test([0.1, 0.2, 0.3, 0.7, 1e-9]) == 2 / 32
    # .1 + .2 + .3 - .3 rounds to .3000000000000001 and -.1 -.2 + .3 + .3 to .29999999999999993: the same sum. Of 8 up
    # to their sign .9 .7 .5 .3 .3 .3 .1 .1: 6 reach .3.
    assert sign_flip_test([0.1, 0.2, 0.3, -0.3]) == 0.75
    assert sign_flip_test([1.0] * 16) == 2 / 2**16  # still exact: at random it could not be below 1 / 20,001


def test_sign_flip_test_at_random_agrees_with_all_vectors_and_never_says_zero() -> None:
    differences = np.random.default_rng(3).normal(0.3, 1, size=17)
    exact = np.mean(np.abs(np.array(list(itertools.product([-1, 1], repeat=17))) @ differences)
                    >= abs(differences.sum()) - 1e-12)  # fmt: skip
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.012)  # 3.5 standard errors at 20,000 draws
    assert sign_flip_test(np.ones(40)) == 1 / 20001
    assert sign_flip_test(differences) == sign_flip_test(differences)


def test_sign_flip_test_errs_as_often_as_it_says() -> None:
    samples = np.random.default_rng(5).standard_t(3, size=(2000, 8))
    assert np.mean([sign_flip_test(s) <= 0.05 for s in samples]) == pytest.approx(0.05, abs=0.015)


def test_holm_equals_hand_arithmetic() -> None:
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and the last is raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_errs_even_once_no_more_often_than_it_says_and_uncorrected_p_values_do() -> None:
    p_values = np.random.default_rng(1).uniform(size=(4000, 10))
    assert np.mean([min(holm(row)) <= 0.05 for row in p_values]) == pytest.approx(0.05, abs=0.011)
    assert (p_values.min(axis=1) <= 0.05).mean() > 0.35
