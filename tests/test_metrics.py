"""Figures: hand-made examples, what is not defined, and the same numbers from one process as from two."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dvpo.metrics import (
    Means,
    Reduce,
    calibration_error,
    correlation,
    critic_figures,
    explained_variance,
    reward_figures,
    reward_reach,
    rollout_figures,
    signal_figures,
)

VALUES = torch.tensor([0.2, 0.8, 0.6, 0.4])
RETURNS = torch.tensor([0.0, 1.0, 1.0, 0.0])
ALL = torch.ones(4, dtype=torch.bool)
NOTHING = torch.zeros(0)


def alone(tensor: Tensor) -> Tensor:
    return tensor


def on_two_processes(figure: Callable[..., Any], tensors: tuple[Tensor, ...], cut: int) -> list[Any]:
    """The figure as two processes see it that hold the rows before and behind `cut`: threads that meet to add up."""
    barrier, shares = Barrier(2, timeout=120), [torch.empty(0), torch.empty(0)]

    def process(rank: int) -> Any:
        def reduce(tensor: Tensor) -> Tensor:
            shares[rank] = tensor
            barrier.wait()
            total = shares[0] + shares[1]
            barrier.wait()
            return total

        return figure(*(x[:cut] if rank == 0 else x[cut:] for x in tensors), reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))


# By hand


def test_means_weigh_micro_batches_by_their_size():
    means = Means()
    means.add("loss", torch.tensor([1.0, 2.0, 3.0]))
    means.add("loss", torch.tensor([10.0], requires_grad=True))
    means.add("share", torch.tensor([True, False]))
    means.add("nothing", NOTHING)
    result = means.result(alone)
    assert result.pop("nothing") != 0
    assert result == {"loss": 4.0, "share": 0.5}
    assert Means().result(alone) == {}


def test_correlation_by_hand():
    # x = 1, 2, 3 and y = 1, 2, 4: cov = 1, var = 2/3 and 14/9, r = 1 / sqrt(28/27) = .98198.
    assert correlation(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 4]), alone) == pytest.approx(0.98198, abs=1e-5)


def test_explained_variance_by_hand_is_blind_to_an_offset_and_zero_for_a_constant():
    # Return less V is -.2, .2, .4, -.4: variance .1, that of the returns .25: 1 - .4 = .6.
    assert explained_variance(VALUES, RETURNS, alone) == pytest.approx(0.6)
    assert explained_variance(VALUES + 7, RETURNS, alone) == pytest.approx(0.6, abs=1e-5)
    assert explained_variance(RETURNS, RETURNS, alone) == 1.0
    assert explained_variance(0 * VALUES, RETURNS, alone) == 0.0
    assert explained_variance(-RETURNS, RETURNS, alone) == -3.0  # worse than a constant


def test_calibration_error_by_hand():
    # V = .25 before returns of mean .25: no gap. V = .75 before returns of mean 1: .25, on half of the tokens.
    values_K = torch.tensor([0.25] * 4 + [0.75] * 4)
    returns_K = torch.tensor([0.0, 0, 1, 0, 1, 1, 1, 1])
    assert calibration_error(values_K, returns_K, alone) == pytest.approx(0.125)
    # A critic that knows nothing but the mean is calibrated; one beside the mean is wrong by its distance.
    assert calibration_error(torch.full((8,), 0.625), returns_K, alone) == pytest.approx(0)
    assert calibration_error(torch.full((8,), 0.525), returns_K, alone) == pytest.approx(0.1)


def test_opposite_errors_at_different_values_do_not_cancel_in_the_calibration_error():
    values_K, returns_K = torch.tensor([0.4, 0.6] * 5), torch.tensor([0.6, 0.4] * 5)
    assert calibration_error(values_K, returns_K, alone) == pytest.approx(0.2)
    # An outlier among the returns must not throw all values into one bin, where they would.
    values_K, returns_K = torch.cat([values_K, values_K[:1]]), torch.cat([returns_K, torch.tensor([1e4])])
    with_outlier = calibration_error(values_K, returns_K, alone)
    assert with_outlier == pytest.approx((1e4 - 0.4 + 5 * 0.2 + 5 * 0.2) / 11, rel=1e-4)


def test_critic_figures_by_hand():
    # Two states, two heads, three quantiles; ensemble (1, 2, 3) of mean 2 and (0, 1, 5) of mean 2.
    values_KNM = torch.tensor([[[0.0, 2, 4], [2, 2, 2]], [[0.0, 2, 1], [0, 0, 9]]])
    # A third whose reward nobody saw counts in nothing.
    unseen_NM = torch.tensor([[[9.0, 0, 0], [7, 0, 0]]])
    returns_K, truth_K = torch.tensor([3.0, 2.0, 8.0]), torch.tensor([1.0, math.nan, 0.0])
    seen_K = torch.tensor([True, True, False])
    figures = critic_figures(torch.cat([values_KNM, unseen_NM]), returns_K, truth_K, seen_K, alone)
    assert figures["critic/value_mean"] == 2.0
    assert figures["critic/return_mean"] == 2.5
    assert figures["critic/value_error"] == pytest.approx(math.sqrt(0.5))  # errors 1 and 0
    # Levels .1 and .9 of three sorted atoms are the outer two (index round(.2) = 0, round(1.8) = 2): 2 and 5.
    assert figures["critic/spread"] == 3.5
    assert figures["critic/crossing_share"] == pytest.approx(1 / 8)  # 2 > 1, of eight neighbours
    assert figures["critic/head_disagreement"] == pytest.approx((0 + 1) / 2)  # head means 2, 2 and 1, 3
    assert figures["critic/explained_variance"] == 0.0
    assert math.isnan(figures["critic/true_correlation"])  # one known truth


def test_a_scalar_critic_has_no_spread_and_a_single_head_no_disagreement():
    figures = critic_figures(VALUES.view(4, 1, 1), RETURNS, RETURNS, ALL, alone)
    assert not set(figures) & {"critic/spread", "critic/crossing_share", "critic/head_disagreement"}
    assert figures["critic/true_correlation"] == pytest.approx(
        # cov = .1, var .05 and .25: .1 / sqrt(.0125)
        0.894427,
        abs=1e-5,
    )


class Responses(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.mask_BT)


def test_the_reach_of_a_reward_by_hand():
    # Two and one policy tokens: (.5 + 1 + 1) / 3; what the policy did not write does not come between.
    mask_BT = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    assert reward_reach(mask_BT, 0.5, alone) == pytest.approx(2.5 / 3)
    assert reward_reach(mask_BT, 1.0, alone) == 1.0
    # Of L tokens: (1 - d^L) / (1 - d) / L.
    assert reward_reach(torch.ones(1, 300).bool(), 0.95, alone) == pytest.approx(0.0667, abs=1e-4)


def test_rollout_figures_by_hand():
    # Three responses of 3, 2 (a word of the environment between them) and 1 tokens; the first is cut; 5 were drawn.
    rollout = Responses(
        mask_BT=torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 0]]).bool(), truncated_B=torch.tensor([True, False, False])
    )
    expected = {"sampled": 5, "tokens": 6, "length": 2, "truncated": 1 / 3}
    assert rollout_figures(rollout, 5, alone) == pytest.approx({f"rollout/{name}": x for name, x in expected.items()})


def test_reward_figures_by_hand():
    nan = math.nan
    figures = reward_figures(
        observed_B=torch.tensor([1.0, 0.0, 1.0, nan, 1.0]),
        true_B=torch.tensor([1.0, 1.0, nan, 0.0, 1.0]),
        rewarded_B=torch.tensor([True, True, True, False, True]),
        groups_B=torch.zeros(5),
        reduce=alone,
    )
    expected = {"reward/observed": 3 / 4, "reward/true": 3 / 4, "reward/accuracy": 2 / 3, "reward/missing": 1 / 5}
    assert math.isnan(figures.pop("reward/pairwise_accuracy"))  # the one wrong response has no observed reward
    assert figures == pytest.approx(expected)


def test_pairwise_accuracy_by_hand():
    nan = math.nan
    # Prompt 0: right .9 and .1, wrong .1 and .5: pairs (.9, .1) 1, (.9, .5) 1, (.1, .1) 1/2, (.1, .5) 0.
    # Prompt 1: right -3, wrong -4: 1. Across prompts, -3 would lose against .1 and .5, -4 win nothing: not counted.
    # Prompt 2: three grades of truth, 0 < .5 < 1, observed 2, 7, 5: pairs (7, 2) 1, (5, 2) 1, (5, 7) 0.
    # Missing or unknown: no pair. In all 5.5 of 8.
    observed_B = torch.tensor([0.9, 0.1, 0.1, 0.5, -3.0, -4.0, 2.0, 7.0, 5.0, nan, 9.0])
    true_B = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5, 1.0, 1.0, nan])
    groups_B = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 1, 0])
    figures = reward_figures(observed_B, true_B, observed_B.isfinite(), groups_B, alone)
    assert figures["reward/pairwise_accuracy"] == pytest.approx(5.5 / 8)


def test_pairwise_accuracy_ignores_each_prompt_s_own_offset_and_positive_scale():
    generator = torch.Generator().manual_seed(0)
    true_B, groups_B = torch.rand(60, generator=generator).round(), torch.arange(60) // 6
    observed_B = true_B + torch.randn(60, generator=generator)
    offset_B, scale_B = (torch.rand(10, generator=generator)[groups_B] for _ in range(2))
    moved_B = 5 * offset_B + (0.5 + scale_B) * observed_B
    everyone_B = torch.ones(60, dtype=torch.bool)
    plain, moved = (
        reward_figures(seen_B, true_B, everyone_B, groups_B, alone)["reward/pairwise_accuracy"]
        for seen_B in (observed_B, moved_B)
    )
    assert plain == moved


def test_prompts_without_signal_by_hand():
    nan = math.nan
    # Prompt 0: a flip breaks the tie of two right responses. 1: the two that were seen are alike, the truth is not.
    # 2: one seen, one known: none observed, and the truth says nothing. 3: one response, no group. 4: alike to 1e-7.
    observed_B = torch.tensor([1.0, 0.0, 1.0, 1.0, nan, nan, 1.0, 0.0, 0.5, 0.5 + 1e-7])
    true_B = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, nan, 0.0, 1.0, 0.0])
    groups_B = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 4, 4])
    expected = {"reward/no_signal": 3 / 4, "reward/no_signal_true": 1 / 3}  # 1, 2, 4 of 0, 1, 2, 4;  0 of 0, 1, 4
    assert signal_figures(observed_B, true_B, groups_B, alone) == pytest.approx(expected)
    for cut in (2, 5, 10):  # a prompt's responses are on one process
        for figures in on_two_processes(signal_figures, (observed_B, true_B, groups_B), cut):
            assert figures == pytest.approx(expected)
    lone = signal_figures(observed_B, true_B, torch.arange(10), alone)
    assert all(math.isnan(lone[key]) for key in expected)


# Not defined


def test_what_is_not_defined_is_nan():
    for pair in ((NOTHING, NOTHING), (VALUES[:1], RETURNS[:1])):
        assert all(math.isnan(figure(*pair, alone)) for figure in (correlation, explained_variance, calibration_error))
    assert math.isnan(correlation(VALUES, torch.ones(4), alone))
    assert math.isnan(explained_variance(VALUES, torch.ones(4), alone))
    unknown_B = torch.full((2,), math.nan)
    rewards = reward_figures(unknown_B, unknown_B, torch.zeros(2, dtype=torch.bool), torch.zeros(2), alone)
    assert math.isnan(rewards["reward/observed"])
    assert rewards.pop("reward/missing") == 1
    figures = critic_figures(torch.zeros(0, 2, 3), NOTHING, NOTHING, NOTHING.bool(), alone)
    assert all(math.isnan(value) for value in (*rewards.values(), *figures.values()))


# Several processes


def samples(count: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values_KNM = torch.rand(count, 3, 5, generator=generator)
    truth_K = torch.rand(count, generator=generator).round()
    truth_K[::7] = math.nan
    returns_K = torch.randn(count, generator=generator) + values_KNM.mean((1, 2))
    return values_KNM, returns_K, truth_K, torch.rand(count, generator=generator) < 0.8


@pytest.mark.parametrize("cut", [20, 3, 0])
def test_critic_figures_are_those_of_the_global_batch_however_processes_share_it(cut):
    tensors = samples()
    expected = critic_figures(*tensors, alone)
    assert all(math.isfinite(x) for x in expected.values())
    for figures in on_two_processes(critic_figures, tensors, cut):
        assert figures == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cut", [2, 5])
def test_reward_figures_are_those_of_the_global_batch(cut):
    observed_B = torch.tensor([1.0, 0.0, 0.3, 0.7, 0.2, math.nan, 1.0])
    true_B = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, math.nan])
    groups_B = torch.tensor([0, 0, 1, 1, 1, 2, 2])  # a prompt's responses are on one process
    tensors = observed_B, true_B, observed_B.isfinite(), groups_B
    expected = reward_figures(*tensors, alone)
    assert expected["reward/pairwise_accuracy"] == pytest.approx(2 / 3)  # (1 + 1/2)/2 would be the processes' mean
    for figures in on_two_processes(reward_figures, tensors, cut):
        assert figures == pytest.approx(expected)


def test_a_mean_of_the_processes_means_would_be_another_number():
    def mean(values: Tensor, reduce: Reduce) -> float:
        means = Means()
        means.add("x", values)
        return means.result(reduce)["x"]

    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert on_two_processes(mean, (values,), 3) == [4.0, 4.0]
    assert (mean(values[:3], alone) + mean(values[3:], alone)) / 2 == 6.0
