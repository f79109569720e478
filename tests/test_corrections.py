"""What estimated rates take out of rewards and values: unbiased, once, and for the actor alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvpo.core.returns import gae
from dvpo.core.risk import noise_corrected_value, trimmed_mean
from dvpo.loading import load_config
from dvpo.settings import RewardConfig
from dvpo.shaping import NO_RATES, Rates, Signals, correct_rewards, forward_weights
from dvpo.trainer import Trainer
from responses import NOISE, estimate, shape, signals
from runs import Parity, run_config

# Noise taken out, by estimated rates


DENOISED = ("reward.trusted=0.1", "advantage.law.functional=denoised")


def observed_law(success: float, rates: Rates, num_atoms: int) -> Tensor:
    """The atoms of Bernoulli(s), s = v (1 - q) + (1 - v) p; M is such that s M is a whole number."""
    share = success * (1 - rates.false_negative) + (1 - success) * rates.false_positive
    ones = round(share * num_atoms)
    assert ones == pytest.approx(share * num_atoms)
    return torch.cat([torch.zeros(num_atoms - ones), torch.ones(ones)])


def one_state(theta_M: Tensor, reward: float, rates: Rates) -> Signals:
    """One token whose value law every one of two heads knows exactly."""
    return Signals(
        rewards_BT=torch.tensor([[reward]]),
        mask_BT=torch.tensor([[True]]),
        values_BTNM=theta_M.expand(1, 1, 2, -1),
        bootstrap_BNM=torch.zeros(1, 2, len(theta_M)),
        zero_last_delta_B=torch.tensor([False]),
        groups_B=torch.tensor([0]),
        rewarded_B=torch.tensor([True]),
        seed=0,
        rates=rates,
    )


@pytest.mark.parametrize("success", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("name", ["dvpo_plain", "ppo"])
def test_on_an_exact_law_the_denoised_advantage_is_the_corrected_reward_less_the_true_success_probability(
    name: str, reward: float, success: float
) -> None:
    theta_M = observed_law(success, NOISE, 20)
    given = one_state(theta_M if name == "dvpo_plain" else theta_M.mean().view(1), reward, NOISE)
    advantage, target = estimate(name, given, *DENOISED)
    # (1 - .1) / .6 = 1.5 and (0 - .1) / .6 = -1/6.
    torch.testing.assert_close(advantage, torch.tensor([[(1.5 if reward else -1 / 6) - success]]))
    torch.testing.assert_close(target, torch.full_like(target, reward))  # as observed: its law is trimmed


@pytest.mark.parametrize("success", [0.5, 0.75])  # at p / (p + q) = .25 noise changes nothing
def test_the_denoised_advantage_is_0_on_average_and_one_denoised_twice_is_not(success: float) -> None:
    theta_M = observed_law(success, NOISE, 20)
    share = float(theta_M.mean())
    means = []
    for functional, rewards in (("denoised", (0.0, 1.0)), ("denoised", (-1 / 6, 1.5)), ("mean", (-1 / 6, 1.5))):
        law = ("reward.trusted=0.1", f"advantage.law.functional={functional}")
        low, high = (estimate("dvpo_plain", one_state(theta_M, r, NOISE), *law)[0].item() for r in rewards)
        means.append((1 - share) * low + share * high)
    assert means[0] == pytest.approx(0, abs=1e-6)
    assert abs(means[1]) > 0.05  # the reward corrected before and again
    assert abs(means[2]) > 0.05  # the reward corrected, the value not


@pytest.mark.parametrize("name", ["dvpo_plain", "dvpo_paper", "ppo", "ppo_ensemble", "robust_ppo"])
def test_without_noise_the_denoised_estimate_is_that_of_the_mean(name: str) -> None:
    given = signals(num_quantiles=5 if name.startswith("dvpo") else 1)
    assert given.rates == NO_RATES
    for ours, plain in zip(estimate(name, given, *DENOISED), estimate(name, given), strict=True):
        torch.testing.assert_close(ours, plain)


def test_only_the_actor_sees_the_corrected_reward_and_the_denoised_value() -> None:
    for name, value in (
        ("dvpo_plain", lambda theta: trimmed_mean(theta, lo=0.3, hi=0.1)),
        ("ppo", lambda theta: noise_corrected_value(theta.mean(dim=-1), 0.1, 0.3)),
    ):
        given = dataclasses.replace(signals(num_quantiles=5 if name == "dvpo_plain" else 1), rates=NOISE)
        given = dataclasses.replace(given, bootstrap_BNM=given.values_BTNM[:, 0])  # all cut short, and worth something
        advantages_BT, targets = estimate(name, given, *DENOISED)
        rewards_BT = correct_rewards(given.rewards_BT, given.mask_BT, given.rewarded_B, NOISE)
        values_BT, ends_B = (value(theta.mean(dim=-2)) for theta in (given.values_BTNM, given.bootstrap_BNM))
        expected, _ = gae(rewards_BT, values_BT, given.mask_BT, 1.0, 0.95, ends_B)
        torch.testing.assert_close(advantages_BT, expected)
        torch.testing.assert_close(targets, estimate(name, given)[1], rtol=0, atol=0)


def test_a_correction_is_unbiased_for_the_true_reward_and_leaves_a_missing_one_alone() -> None:
    mask_BT, rewarded_B = torch.ones(3, 2, dtype=torch.bool), torch.tensor([True, True, False])
    rewards_BT = torch.tensor([[0.0, 1], [0, 0], [0, 0]])
    said, unsaid, missing = correct_rewards(rewards_BT, mask_BT, rewarded_B, NOISE).sum(dim=-1).tolist()
    assert (1 - NOISE.false_negative) * said + NOISE.false_negative * unsaid == pytest.approx(1)
    assert NOISE.false_positive * said + (1 - NOISE.false_positive) * unsaid == pytest.approx(0, abs=1e-6)
    assert missing == 0


# Forward and backward correction: the expected gradient, every response and every verdict enumerated


def gradients(
    truth_PR: Tensor, rates_P: list[Rates], weigh: Callable[[Tensor, Rates], Tensor]
) -> tuple[Tensor, Tensor]:
    """The true gradient of the mean reward and the expected one, with respect to the logits of a small policy.

    Two tokens of three a prompt, so nine responses; for each of them both verdicts, with their probabilities.
    """
    draw = torch.Generator().manual_seed(5)
    first_PV = torch.randn(len(truth_PR), 3, generator=draw, dtype=torch.float64, requires_grad=True)
    second_PVV = torch.randn(len(truth_PR), 3, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    logp_PVV = first_PV.log_softmax(-1).unsqueeze(-1) + second_PVV.log_softmax(-1)
    logp_PR = logp_PVV.flatten(1)
    clean = (logp_PR.exp() * truth_PR).sum()
    expected = torch.zeros((), dtype=torch.float64)
    for logp_R, truth_R, rates in zip(logp_PR, truth_PR, rates_P, strict=True):
        said_R = torch.where(truth_R > 0, 1 - rates.false_negative, rates.false_positive)
        for verdict, probability_R in ((1.0, said_R), (0.0, 1 - said_R)):
            weights_R = weigh(torch.full_like(truth_R, verdict), rates)
            expected = expected + (logp_R.exp().detach() * probability_R * weights_R * logp_R).sum()
    parameters = (first_PV, second_PVV)
    return tuple(  # type: ignore[return-value]
        torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
        for value in (clean, expected)
    )


def by(correction: Callable[..., Tensor], believed: Rates | None = None) -> Callable[[Tensor, Rates], Tensor]:
    """The weight of each response under a correction, by the true rates or by others."""

    def weigh(returns_R: Tensor, rates: Rates) -> Tensor:
        ones_R1 = torch.ones(len(returns_R), 1, dtype=torch.bool)
        return correction(returns_R.unsqueeze(-1), ones_R1, ones_R1[:, 0], believed or rates).squeeze(-1)

    return weigh


TRUTH_1R = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0, 1]], dtype=torch.float64)
TRUTH_2R = torch.cat([TRUTH_1R, 1 - TRUTH_1R])


@pytest.mark.parametrize("rates", [NOISE, Rates(0.0, 0.5), Rates(0.4, 0.0), NO_RATES])
def test_the_forward_gradient_is_the_true_one_times_1_less_p_less_q_and_the_backward_one_is_the_true_one(
    rates: Rates,
) -> None:
    for truth in (TRUTH_1R, TRUTH_2R):
        clean, forward = gradients(truth, [rates] * len(truth), by(forward_weights))
        torch.testing.assert_close(forward, (1 - rates.false_positive - rates.false_negative) * clean)
        _, backward = gradients(truth, [rates] * len(truth), by(correct_rewards))
        torch.testing.assert_close(backward, clean)


def test_the_forward_direction_needs_no_false_positive_rate_and_the_backward_length_does() -> None:
    half_known = Rates(0.0, NOISE.false_negative)
    clean, forward = gradients(TRUTH_2R, [NOISE] * 2, by(forward_weights, half_known))
    torch.testing.assert_close(forward, 0.6 * clean)
    _, backward = gradients(TRUTH_2R, [NOISE] * 2, by(correct_rewards, half_known))
    torch.testing.assert_close(backward, 0.6 / 0.7 * clean)


def test_where_rates_differ_between_prompts_backward_keeps_the_direction_and_forward_does_not() -> None:
    rates = [Rates(0.0, 0.1), Rates(0.3, 0.4)]
    clean, backward = gradients(TRUTH_2R, rates, by(correct_rewards))
    torch.testing.assert_close(backward, clean)
    _, forward = gradients(TRUTH_2R, rates, by(forward_weights))
    assert torch.cosine_similarity(forward, clean, dim=0) < 0.98  # the true factors are .9 and .3
    # And with one pair of rates believed of both, as is estimated here, neither does.
    _, mistaken = gradients(TRUTH_2R, rates, by(correct_rewards, Rates(0.15, 0.25)))
    assert torch.cosine_similarity(mistaken, clean, dim=0) < 0.98


def test_what_is_particular_to_forward_weights_is_that_a_right_response_gets_0_on_average() -> None:
    """Any constant taken from the reward leaves the expected direction; this one makes right responses pay nothing."""
    p, q = NOISE
    said, unsaid = by(forward_weights)(torch.tensor([1.0, 0.0], dtype=torch.float64), NOISE).tolist()
    assert (said, unsaid) == pytest.approx((q, q - 1))
    assert (1 - q) * said + q * unsaid == pytest.approx(0)
    assert p * said + (1 - p) * unsaid == pytest.approx(-(1 - p - q))
    assert (1 - q) * 1 + q * 0 != pytest.approx(0)  # the reward as it is does not


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_row_that_takes_the_groups_mean_does_not_see_forward_weights(name: str) -> None:
    given = signals()
    weighed = dataclasses.replace(given, rewards_BT=shape("none", correction="forward", rates=NOISE) * given.mask_BT)
    torch.testing.assert_close(estimate(name, weighed)[0], estimate(name, given)[0], rtol=1e-4, atol=1e-5)


def test_a_row_without_a_baseline_does() -> None:
    given = signals()
    weighed = dataclasses.replace(given, rewards_BT=shape("none", correction="forward", rates=NOISE) * given.mask_BT)
    difference_BT = estimate("reinforce_pp", weighed)[0] - estimate("reinforce_pp", given)[0]
    torch.testing.assert_close(difference_BT, -0.7 * given.mask_BT.float())


def test_rewards_of_several_turns_are_corrected_as_their_sum() -> None:
    rewards_BT = torch.tensor([[0.25, 0, 0.75]])
    corrected = correct_rewards(rewards_BT, torch.ones(1, 3).bool(), torch.tensor([True]), NOISE)
    torch.testing.assert_close(corrected.sum(dim=-1), torch.tensor([1.5]))


def test_a_correction_comes_before_the_normalisation_which_takes_it_out_again() -> None:
    corrected, plain = (shape("group", correction=c, rates=NOISE) for c in ("backward", "none"))
    torch.testing.assert_close(corrected, plain, rtol=1e-3, atol=1e-3)
    assert shape("none", clip=0.5, correction="backward", rates=NOISE).max() == 0.5


def test_grpo_corrected_is_dr_grpos_advantage_scaled_and_grpo_itself_cannot_be_corrected() -> None:
    given = signals()
    rewards_BT = shape("none", correction="backward", rates=NOISE)
    corrected = dataclasses.replace(given, rewards_BT=rewards_BT * given.mask_BT)
    torch.testing.assert_close(estimate("grpo_corrected", corrected)[0], estimate("dr_grpo", given)[0] / 0.6)
    torch.testing.assert_close(estimate("grpo", corrected)[0], estimate("grpo", given)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("row", "plain"), [("ppo_corrected", "ppo"), ("grpo_corrected", "grpo")])
def test_a_corrected_row_differs_from_the_plain_one_in_its_rewards_alone(row: str, plain: str) -> None:
    config = load_config({"algorithm": row})
    assert (config.reward.correction, config.reward.trusted) == ("backward", 0.05)
    back = dataclasses.replace(config, algorithm=plain, reward=RewardConfig())
    assert back == load_config({"algorithm": plain})


def test_a_run_corrects_by_what_it_has_counted_so_far(tmp_path: Path) -> None:
    """Parity says 1 about as often as 0; with every other verdict wrong at rate .3, p = q = .3."""
    many = ("sampling.prompts_per_step=16", "sampling.samples_per_prompt=8", "reward.trusted=1")
    noise = ("noise.kind=flip", "noise.rate=0.3", "reward.correction=backward", "algorithm=ppo")
    trainer = Trainer(run_config(tmp_path / "run", *many, *noise), task=Parity())
    figures = trainer.train_step()
    trainer.close()
    p, q = trainer.rates.rates()
    assert abs(p - 0.3) < 0.15
    assert abs(q - 0.3) < 0.15
    assert figures["noise/correction"] == pytest.approx(1 / (1 - p - q))
    # No discount: the mean return over tokens lies between the two corrected rewards, weighted by observed ones.
    assert -p / (1 - p - q) < figures["critic/return_mean"] < (1 - p) / (1 - p - q)
