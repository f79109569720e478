"""How noisy a reward looks: what the same answers' scores say of each other, and of the truth where it is known.

Arrays carry shape letters as in `batch.py`, with R scorings of the same answers, P prompts, K answers a prompt.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dvpo.metrics import SAME
from dvpo.noise_rates import Tally, count_false, is_binary
from dvpo.stats import clopper_pearson

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sheet:
    """Answers and their scores; NaN where there is none."""

    observed_RPK: Array
    true_PK: Array
    others_PK: dict[str, Array]
    """What further rewards say of the same answers."""
    lengths_PK: Array
    """Tokens."""
    truncated_PK: NDArray[np.bool_]
    faulty_RPK: NDArray[np.bool_]
    """Scores that were lost to a fault of the reward."""
    fault: str | None = None
    """The first fault in one line."""
    judged_by_truth: bool = False
    """The observed reward is the task's own verdict, so that comparing the two shows nothing."""


@dataclass(frozen=True)
class Agreement:
    """What two scorings of the same answers have in common; None where nothing can be compared."""

    name: str
    equal: float | None
    """Share of answers with the same score."""
    order: float | None
    """Share of pairs of answers to one prompt, different for both, that both put in the same order."""
    pairs: int
    """Of which there are so many."""


@dataclass(frozen=True)
class ErrorRate:
    """A rate of false verdicts with its exact 95% interval (Clopper-Pearson)."""

    wrong: int
    seen: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.wrong / self.seen if self.seen else math.nan

    @property
    def tally(self) -> Tally:
        return Tally(self.wrong, self.seen)


@dataclass(frozen=True)
class Findings:
    """What a diagnosis reports. Shares lie in 0..1, deviations are in units of the reward; None: cannot be told."""

    prompts: int
    samples: int
    repeats: int
    binary: bool
    """Every observed reward is 0 or 1."""
    spread: float
    """5% to 95% quantile of the observed rewards; 1 if they are binary."""
    outlier: float
    """Largest distance from the median in scaled median deviations (see `outlier`); 0 if binary or all equal."""
    missing: float
    faults: float
    fault: str | None
    faults_stay: bool
    """There are several scorings, and an answer that lost its score to a fault in one lost it in all."""
    length: float
    """Mean tokens of an answer."""
    truncated: float
    silent: float
    """Share of prompts without signal: fewer than two rewards, or all the same."""
    silent_truth: float | None
    """The same of true rewards, over the prompts whose truth is known: what it would be without noise."""
    signal: list[float]
    """Expected share of prompts with signal of 2, 3, ... `samples` answers each, from true rewards where known."""
    within: float | None
    """Deviation of the rewards of one prompt's answers."""
    between: float | None
    """Deviation of the prompts' mean rewards, what `within` adds to it taken out."""
    repeat_equal: float | None
    """Share of answers whose first two scores are the same."""
    repeat_deviation: float | None
    """Deviation of the scores of one answer."""
    flip: float | None
    """Binary rewards: rate of independent symmetric flips that explains `repeat_equal`."""
    agreements: list[Agreement] = field(default_factory=list)
    """Of the further rewards with the observed one."""
    false_positive: ErrorRate | None = None
    """None as well where some reward or truth is neither 0 nor 1: the others would be chosen by what is counted."""
    false_negative: ErrorRate | None = None
    judged_by_truth: bool = False


def find(sheet: Sheet) -> Findings:
    """All that a sheet says."""
    first_PK = sheet.observed_RPK[0]
    seen = sheet.observed_RPK[np.isfinite(sheet.observed_RPK)]
    binary = len(seen) > 0 and _binary(seen)
    known_PK = sheet.true_PK[np.isfinite(sheet.true_PK).any(axis=1)]
    knows_truth = len(known_PK) > 0
    repeat_equal, repeat_deviation = repeatability(sheet.observed_RPK)
    within, between = deviations(first_PK)
    can_count = knows_truth and not sheet.judged_by_truth and _binary(seen) and _binary(sheet.true_PK)
    rates = error_rates(first_PK, sheet.true_PK) if can_count else None
    repeats, prompts, samples = sheet.observed_RPK.shape
    guide_PK = known_PK if knows_truth else first_PK
    return Findings(
        prompts=prompts,
        samples=samples,
        repeats=repeats,
        binary=binary,
        spread=1.0 if binary else float(np.ptp(np.quantile(seen, (0.05, 0.95)))) if len(seen) else 0.0,
        outlier=0.0 if binary else outlier(seen),
        missing=float(np.isnan(sheet.observed_RPK).mean()),
        faults=float(sheet.faulty_RPK.mean()),
        fault=sheet.fault,
        faults_stay=repeats > 1 and bool((sheet.faulty_RPK == sheet.faulty_RPK[0]).all()),
        length=float(sheet.lengths_PK.mean()),
        truncated=float(sheet.truncated_PK.mean()),
        silent=silent(first_PK),
        silent_truth=silent(known_PK) if knows_truth else None,
        signal=[signal(guide_PK, k) for k in range(2, max(map(len, _groups(guide_PK)), default=0) + 1)],
        within=within,
        between=between,
        repeat_equal=repeat_equal,
        repeat_deviation=repeat_deviation,
        flip=None if repeat_equal is None or not binary else flip_rate(repeat_equal),
        agreements=[agreement(name, first_PK, other_PK) for name, other_PK in sheet.others_PK.items()],
        false_positive=rates[0] if rates else None,
        false_negative=rates[1] if rates else None,
        judged_by_truth=sheet.judged_by_truth,
    )


def error_rates(observed: Array, true: Array) -> tuple[ErrorRate, ErrorRate]:
    """How often a wrong answer is taken for a right one, and a right one for a wrong one.

        p = P(observed 1 | true 0),   q = P(observed 0 | true 1)

    The intervals hold for errors that are independent given the truth. Errors that a prompt's answers share (a wrong
    reference) leave the rates right on average and make the intervals too narrow.

    Args:
        observed: returns of any shape, NaN where missing; one score an answer, for a second one is no second answer.
        true: of the same shape, NaN where unknown; both hold nothing but 0 and 1 besides.
    """
    counts = count_false(torch.from_numpy(observed.ravel()), torch.from_numpy(true.ravel())).tolist()
    false_positives, wrong, false_negatives, right = counts
    return (
        ErrorRate(false_positives, wrong, *clopper_pearson(false_positives, wrong)),
        ErrorRate(false_negatives, right, *clopper_pearson(false_negatives, right)),
    )


def repeatability(observed_RPK: Array) -> tuple[float | None, float | None]:
    """Share of answers with the same first two scores, and the deviation of one answer's scores (n - 1)."""
    if len(observed_RPK) < 2:
        return None, None
    scores_RB = observed_RPK.reshape(len(observed_RPK), -1)
    scores_RB = scores_RB[:, np.isfinite(scores_RB).all(axis=0)]
    if not scores_RB.size:
        return None, None
    equal = np.abs(scores_RB[0] - scores_RB[1]) < SAME
    return float(equal.mean()), float(np.sqrt(scores_RB.var(axis=0, ddof=1).mean()))


def flip_rate(equal: float) -> float:
    """The e < 1/2 with equal = e^2 + (1 - e)^2: two scores agree if both or neither were flipped."""
    return (1 - math.sqrt(max(2 * equal - 1, 0.0))) / 2


def deviations(rewards_PK: Array) -> tuple[float | None, float | None]:
    """Deviation within and between prompts, by the method of moments of a one-way layout.

        within^2 = mean_p s_p^2,   between^2 = var_p(mean_p) - mean_p(s_p^2 / n_p), at least 0

    s_p^2 with n_p - 1 over the n_p >= 2 rewards of prompt p.
    """
    groups = [group for group in _groups(rewards_PK) if len(group) > 1]
    if not groups:
        return None, None
    variances = [group.var(ddof=1) for group in groups]
    within = math.sqrt(np.mean(variances))
    if len(groups) < 2:
        return within, None
    of_means = np.var([group.mean() for group in groups], ddof=1)
    share = np.mean([variance / len(group) for variance, group in zip(variances, groups, strict=True)])
    return within, math.sqrt(max(float(of_means - share), 0.0))


def silent(rewards_PK: Array) -> float:
    """Share of prompts whose rewards do not tell one answer from another."""
    return float(np.mean([len(group) < 2 or np.ptp(group) < SAME for group in _groups(rewards_PK)]))


def signal(rewards_PK: Array, k: int) -> float:
    """Expected share of prompts with signal if k of their n answers are drawn without replacement.

        mean_p [ 1 - sum_v C(c_pv, k) / C(n_p, k) ],   c_pv answers of prompt p with reward v

    Unbiased for prompts with n >= k rewards; those with fewer have no say.
    """
    shares = []
    for group in _groups(rewards_PK):
        if len(group) >= k:
            _, counts = np.unique(np.round(group / SAME), return_counts=True)
            shares.append(1 - sum(math.comb(int(count), k) for count in counts) / math.comb(len(group), k))
    return float(np.mean(shares)) if shares else 0.0


def agreement(name: str, one_PK: Array, other_PK: Array) -> Agreement:
    """How far two rewards agree: in the scores, and, whatever their scales, in the order of a prompt's answers."""
    both_PK = np.isfinite(one_PK) & np.isfinite(other_PK)
    equal = np.abs(one_PK - other_PK)[both_PK] < SAME
    same = pairs = 0
    for one, other, both in zip(one_PK, other_PK, both_PK, strict=True):
        products = _signs(one[both]) * _signs(other[both])
        same, pairs = same + int((products > 0).sum()), pairs + int((products != 0).sum())
    return Agreement(name, float(equal.mean()) if len(equal) else None, same / pairs if pairs else None, pairs)


def outlier(rewards: Array) -> float:
    """max |r - median| / (1.4826 median |r - median|), which a normal law keeps below 5 or so; 0 without deviation.

    Where most rewards are equal the median deviation is 0, and that of the others takes its place.
    """
    distance = np.abs(rewards - np.median(rewards)) if len(rewards) else rewards
    if not (distance > SAME).any():
        return 0.0
    scale = float(np.median(distance))
    return float(distance.max()) / (1.4826 * (scale if scale > SAME else float(np.median(distance[distance > SAME]))))


def _binary(rewards: Array) -> bool:
    return bool(is_binary(torch.from_numpy(rewards[np.isfinite(rewards)])).all())


def _groups(rewards_PK: Array) -> list[Array]:
    return [row[np.isfinite(row)] for row in rewards_PK]


def _signs(rewards: Array) -> NDArray[Any]:
    """Which of each pair is better: +1, -1, or 0 for equals."""
    upper = np.triu_indices(len(rewards), 1)
    gaps = (rewards[:, None] - rewards)[upper]
    return np.where(np.abs(gaps) < SAME, 0, np.sign(gaps))
