"""What a sheet of scores says: by hand, by enumeration, and, of injected rates, by simulation."""

import itertools
import math

import numpy as np
import pytest

from dvpo.diagnosis import (
    Sheet,
    agreement,
    deviations,
    error_rates,
    find,
    flip_rate,
    outlier,
    repeatability,
    signal,
    silent,
)
from dvpo.loading import load_config
from dvpo.noise import make_noise

RATES = (0.0, 0.1, 0.3)
CASES = 1000
RIGHT = WRONG = 40
"""Answers of each kind in a case."""
NAN = math.nan


def judged(false_positive: float, false_negative: float):
    """Observed and true rewards of all cases, [CASES, WRONG + RIGHT], through the noise of a run."""
    noise = {"kind": "asymmetric", "false_positive": false_positive, "false_negative": false_negative}
    model = make_noise(load_config({"noise": noise}).noise, seed=3)
    truth = [0.0] * WRONG + [1.0] * RIGHT
    size = len(truth)
    observed = [model(truth, ["p"] * size, [case] * size, range(size), [[]] * size) for case in range(CASES)]
    return np.array(observed, dtype=float), np.tile(truth, (CASES, 1))


@pytest.mark.parametrize("false_negative", RATES)
@pytest.mark.parametrize("false_positive", RATES)
def test_intervals_cover_the_injected_rates_in_at_least_93_of_100_cases(false_positive: float, false_negative: float):
    observed, true = judged(false_positive, false_negative)
    covered = np.zeros(2)
    for said, right in zip(observed, true, strict=True):
        rates = error_rates(said, right)
        assert [rate.seen for rate in rates] == [WRONG, RIGHT]
        covered += [r.low <= p <= r.high for r, p in zip(rates, (false_positive, false_negative), strict=True)]
    assert (covered / CASES >= 0.93).all(), covered


def test_the_swapped_rates_are_not_covered():
    observed, true = judged(0.1, 0.3)
    rates = [error_rates(said, right) for said, right in zip(observed, true, strict=True)]
    assert np.mean([p.low <= 0.3 <= p.high for p, _ in rates]) < 0.2
    assert np.mean([q.low <= 0.1 <= q.high for _, q in rates]) < 0.2


def plain(observed_RPK: np.ndarray, true_PK: np.ndarray) -> Sheet:
    shape = true_PK.shape
    cells = {"lengths_PK": np.ones(shape), "truncated_PK": np.zeros(shape, bool)}
    return Sheet(observed_RPK, true_PK, {}, faulty_RPK=np.zeros(observed_RPK.shape, bool), **cells)


@pytest.mark.parametrize("graded", ["reward", "truth"])
def test_one_graded_reward_or_truth_leaves_no_rates(graded: str):
    # Were 1.5 dropped, one of one wrong answers would be taken for right: a rate of 1 by selection.
    observed, true = np.array([[[1.0, 0.0, 1.0]]]), np.array([[0.0, 0.0, 1.0]])
    assert find(plain(observed, true)).false_positive.seen == 2
    if graded == "reward":
        observed[0, 0, 1] = 1.5
    else:
        true[0, 1] = 0.5
    found = find(plain(observed, true))
    assert (found.false_positive, found.false_negative) == (None, None)


def test_rates_count_where_both_rewards_are_known():
    observed = np.array([1.0, 0.0, NAN, 0.0, 1.0, 1.0])
    true = np.array([0.0, 0.0, 0.0, 1.0, 1.0, NAN])
    p, q = error_rates(observed, true)
    assert (p.wrong, p.seen, q.wrong, q.seen) == (1, 2, 1, 2)
    assert p.share == 0.5


def test_repeatability_compares_the_scores_of_one_answer_and_leaves_out_what_lost_one():
    # Answers: (1, 1), (0, 1), (missing); variances with n - 1: 0 and 1/2, mean 1/4, deviation 1/2.
    equal, deviation = repeatability(np.array([[[1.0, 0.0, NAN]], [[1.0, 1.0, 1.0]]]))
    assert (equal, deviation) == (0.5, 0.5)
    assert repeatability(np.ones((1, 2, 2))) == (None, None)


def test_the_flip_rate_explains_the_agreement_of_two_independent_scores():
    for rate in (0.0, 0.1, 0.3, 0.5):
        assert flip_rate(rate**2 + (1 - rate) ** 2) == pytest.approx(rate, abs=1e-7)
    assert flip_rate(0.4) == 0.5  # less than chance: as noisy as can be


def test_deviations_within_and_between_prompts_by_hand_and_in_a_simulation():
    # Variances 2 and 2, means 1 and 5: within sqrt 2, between sqrt(8 - 2/2). The naive sqrt 8 would count noise twice.
    assert deviations(np.array([[0.0, 2.0], [4.0, 6.0]])) == pytest.approx((math.sqrt(2), math.sqrt(7)))
    rng = np.random.default_rng(0)
    rewards = rng.normal(0, 0.5, (4000, 1)) + rng.normal(0, 2.0, (4000, 4))
    assert deviations(rewards) == pytest.approx((2.0, 0.5), rel=0.1)
    assert deviations(np.array([[1.0, NAN]])) == (None, None)


def test_signal_is_the_share_of_subsets_that_differ():
    rewards = np.array([[0.0, 1.0, 1.0, 0.0, 1.0], [1.0] * 5, [0.0, 0.5, 1.0, NAN, NAN]])
    for k in (2, 3):
        groups = [row[np.isfinite(row)] for row in rewards]
        shares = [np.mean([len(set(s)) > 1 for s in itertools.combinations(group, k)]) for group in groups]
        assert signal(rewards, k) == pytest.approx(np.mean(shares))
    assert silent(rewards) == pytest.approx(1 / 3)


def test_agreement_is_in_the_scores_and_in_the_order_whatever_the_scale():
    one = np.array([[0.0, 1.0, 1.0], [0.0, 1.0, NAN]])
    other = np.array([[5.0, 7.0, 4.0], [0.0, 1.0, 3.0]])
    # Pairs that both tell apart: (5 < 7, as 0 < 1), (5 > 4, against 0 < 1), and (0 < 1) twice: 2 of 3; equal: 2 of 5.
    found = agreement("x", one, other)
    assert (found.equal, found.order, found.pairs) == (pytest.approx(0.4), pytest.approx(2 / 3), 3)
    assert agreement("x", one, np.full_like(one, NAN)).order is None


def test_an_outlier_is_measured_in_median_deviations():
    # Median 2, distances 2 1 0 1 98, their median 1.
    assert outlier(np.array([0.0, 1.0, 2.0, 3.0, 100.0])) == pytest.approx(98 / 1.4826)
    assert outlier(np.ones(4)) == 0


def test_an_outlier_is_seen_where_most_rewards_are_equal():
    # Median 0 and median deviation 0; the distances of those that differ are 0.5 1 1 100, their median 1.
    assert outlier(np.array([0.0] * 9 + [0.5, 1.0, -1.0, 100.0])) == pytest.approx(100 / 1.4826)


def test_signal_is_told_up_to_the_most_scores_that_a_prompt_has():
    observed = np.array([[[0.0, 1.0, NAN, NAN], [1.0, 0.0, 1.0, NAN]]])
    cells = {"lengths_PK": np.ones((2, 4)), "truncated_PK": np.zeros((2, 4), bool)}
    found = find(Sheet(observed, np.full((2, 4), NAN), {}, faulty_RPK=np.zeros((1, 2, 4), bool), **cells))
    # Pairs: all of the first prompt's differ, 2 of the second's 3; of three scores there is one lot, which differs.
    assert found.signal == pytest.approx([(1 + 2 / 3) / 2, 1.0])


def test_prompts_without_a_truth_have_no_say_about_it():
    true = np.array([[0.0, 1.0], [NAN, NAN], [NAN, NAN]])
    observed = np.array([[[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]])
    cells = {"lengths_PK": np.ones((3, 2)), "truncated_PK": np.zeros((3, 2), bool)}
    found = find(Sheet(observed, true, {}, faulty_RPK=np.zeros((1, 3, 2), bool), **cells))
    assert (found.silent, found.silent_truth, found.signal) == (pytest.approx(2 / 3), 0.0, [1.0])
    assert (found.false_positive.seen, found.false_negative.seen) == (1, 1)
