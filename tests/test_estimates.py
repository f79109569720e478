"""How rows compose core: shaped rewards, pessimism, functionals of the law, groups; and the reductions between rows."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvpo.algorithms import ALGORITHMS
from dvpo.config import Config, load_config
from dvpo.core.backends import ascending
from dvpo.core.masks import identity
from dvpo.core.returns import gae, group_location_scale, group_rank
from dvpo.core.risk import cvar, noise_corrected_value, rank_advantage, trimmed_mean, tv_worst_case
from dvpo.estimates import (
    Signals,
    correct_rewards,
    end_error,
    forward_weights,
    last_token,
    overlong_penalties,
    reward_trust,
    shape_rewards,
)
from dvpo.rates import NO_RATES, Rates
from dvpo.settings import RewardConfig
from dvpo.trainer import Trainer
from runs import Parity, run_config


def signals(num_heads: int = 3, num_quantiles: int = 5) -> Signals:
    """Two prompts of three responses; a gap in the second response, no reward for the last."""
    draw = torch.Generator().manual_seed(11)
    mask_BT = torch.tensor(
        [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool
    )
    rewarded_B = torch.tensor([True, True, True, True, True, False])
    rewards_BT = last_token(mask_BT) * torch.tensor([1.0, 0, 0, 2, 1, 0]).unsqueeze(-1)
    return Signals(
        rewards_BT=rewards_BT,
        mask_BT=mask_BT & rewarded_B.unsqueeze(-1),
        values_BTNM=torch.rand(6, 4, num_heads, num_quantiles, generator=draw),
        bootstrap_BNM=torch.zeros(6, num_heads, num_quantiles),
        zero_last_delta_B=~rewarded_B,
        groups_B=torch.tensor([0, 0, 0, 1, 1, 1]),
        rewarded_B=rewarded_B,
        seed=0,
    )


def estimate(name: str, given: Signals, *overrides: str) -> tuple[Tensor, Tensor]:
    config = load_config({"algorithm": name}, overrides)
    trusting = dataclasses.replace(given, reward_trust=reward_trust(config.advantage, step=1))
    return ALGORITHMS[name].estimate(trusting, config)


# Reductions


def test_robust_ppo_with_one_head_is_ppo() -> None:
    given = signals(num_heads=1, num_quantiles=1)
    for ours, theirs in zip(estimate("robust_ppo", given), estimate("ppo", given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_robust_ppo_takes_the_least_head_as_baseline_and_as_bootstrap_of_its_target() -> None:
    given = signals(num_quantiles=1)
    least_BT = given.values_BTNM.squeeze(-1).amin(dim=-1)
    advantages_BT, returns_BT = gae(given.rewards_BT, least_BT, given.mask_BT, 1.0, 0.95)
    ours, targets = estimate("robust_ppo", given)
    torch.testing.assert_close(ours, advantages_BT)
    torch.testing.assert_close(targets.squeeze(-1), returns_BT)


@pytest.mark.parametrize("name", ["ppo", "dvpo_paper", "dvpo", "ppo_ensemble"])
def test_recentred_values_make_the_end_cost_nothing_and_no_constant_of_the_critic_matters(name: str) -> None:
    given = signals(num_quantiles=1 if name.startswith("ppo") else 5)

    def recentred(offset: float) -> Signals:
        moved = dataclasses.replace(given, values_BTNM=given.values_BTNM + offset)
        return dataclasses.replace(moved, values_BTNM=moved.values_BTNM + end_error(moved, 1.0, identity))

    torch.testing.assert_close(end_error(recentred(3.0), 1.0, identity), torch.tensor(0.0), atol=1e-6, rtol=0)
    for ours, theirs in zip(estimate(name, recentred(0.0)), estimate(name, recentred(3.0)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # By hand: the ends of the five responses that have a reward, less the value there.
    places = [(0, 3), (1, 3), (2, 2), (3, 1), (4, 3)]
    errors = [given.rewards_BT[at] - given.values_BTNM[at].mean() for at in places]
    torch.testing.assert_close(end_error(given, 1.0, identity), torch.stack(errors).mean())
    # A value of 2 after the cut of one of them, discounted by .5: an error of 2 * .5 more, over five.
    cut = dataclasses.replace(given, bootstrap_BNM=given.bootstrap_BNM.clone().index_fill_(0, torch.tensor(0), 2.0))
    torch.testing.assert_close(end_error(cut, 0.5, identity), torch.stack(errors).mean() + 0.2)
    # As it stands, the last step of a response is paid that error.
    raw, fixed = (estimate(name, s)[0] for s in (dataclasses.replace(given), recentred(0.0)))
    if name == "ppo":
        ends = torch.tensor([raw[at] - fixed[at] for at in places])
        torch.testing.assert_close(ends, end_error(given, 1.0, identity).expand(5))


def test_the_trainer_recentres_what_the_advantage_reads_and_not_what_the_critic_said(tmp_path: Path) -> None:
    found = {}
    for recentre in (False, True):
        lines = ["algorithm=ppo", "advantage.whiten=false", f"advantage.recentre={str(recentre).lower()}"]
        trainer = Trainer(run_config(tmp_path / str(recentre), *lines), task=Parity())
        rollout, _ = trainer.collect()
        found[recentre] = trainer.estimate(rollout)[0]
        trainer.close()
    raw, fixed = found[False], found[True]
    torch.testing.assert_close(raw.values_BTNM, fixed.values_BTNM, rtol=0, atol=0)
    ends_BT = last_token(raw.mask_BT)
    assert ((raw.advantages_BT * ends_BT).sum() / ends_BT.sum()).abs() > 1e-3
    assert ((fixed.advantages_BT * ends_BT).sum() / ends_BT.sum()).abs() < 1e-6


@pytest.mark.parametrize("name", ["ppo", "robust_ppo", "dvpo_paper", "rfqi_ppo"])
def test_a_reward_that_is_trusted_by_a_share_counts_by_that_share_in_the_last_difference_alone(name: str) -> None:
    given = signals(num_quantiles=1 if "ppo" in name and "rfqi" not in name else 5)
    whole, targets = estimate(name, given, "advantage.lam=0")  # with lambda = 0 advantages are the differences
    part, same_targets = estimate(name, given, "advantage.lam=0", "advantage.reward_trust=0.25")
    at_end_BT = last_token(given.mask_BT).bool()
    torch.testing.assert_close(part[at_end_BT], 0.25 * whole[at_end_BT])
    torch.testing.assert_close(part[~at_end_BT], whole[~at_end_BT], rtol=0, atol=0)
    torch.testing.assert_close(same_targets, targets, rtol=0, atol=0)


def test_what_the_critic_says_of_the_end_stands_in_for_a_reward_that_is_not_trusted() -> None:
    given = signals(num_quantiles=1)
    # lambda = 1, first response: 1/4 of its reward 1 and 3/4 of V(s_T), less V(s_t) at each token.
    values_T = given.values_BTNM[0].mean(dim=(-2, -1))
    advantages_BT, _ = estimate("ppo", given, "advantage.lam=1", "advantage.reward_trust=0.25")
    torch.testing.assert_close(advantages_BT[0], 0.25 + 0.75 * values_T[-1] - values_T)
    # Trusted not at all it is as if it were missing.
    missing = dataclasses.replace(
        given, zero_last_delta_B=torch.ones(6, dtype=torch.bool), rewards_BT=torch.zeros_like(given.rewards_BT)
    )
    doubted, _ = estimate("ppo", given, "advantage.reward_trust=0")
    torch.testing.assert_close(doubted, estimate("ppo", missing)[0])


def test_doubt_fades_in_a_straight_line() -> None:
    settings = load_config({"advantage": {"reward_trust": 0.2, "doubt_steps": 4}}).advantage
    assert [reward_trust(settings, step) for step in (1, 2, 3, 5, 9)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])
    assert reward_trust(dataclasses.replace(settings, doubt_steps=None), 9) == 0.2


def test_a_rank_compares_what_is_trusted_of_the_return_with_the_law() -> None:
    given = signals()
    theta_BTM = ascending(given.values_BTNM.mean(dim=-2))
    advantages_BT, targets_BTL = estimate("dvpo", given, "advantage.lam=1", "advantage.reward_trust=0.5")
    mixed = 0.5 * 1.0 + 0.5 * theta_BTM[0, -1].mean()
    below = (theta_BTM[0, 0] < mixed).float().mean()
    torch.testing.assert_close(advantages_BT[0, 0], below - 0.5)
    torch.testing.assert_close(targets_BTL, estimate("dvpo", given, "advantage.lam=1")[1], rtol=0, atol=0)


def test_rfqi_with_radius_0_is_the_quantile_critic_with_its_mean() -> None:
    given = signals()
    ours = estimate("rfqi_ppo", given, "advantage.law.radius=0")
    for a, b in zip(ours, estimate("dvpo_plain", given), strict=True):
        torch.testing.assert_close(a, b)


def test_rfqi_is_gae_on_the_worst_case_value_and_trains_on_the_observed_law() -> None:
    given = signals()
    theta_BTM = given.values_BTNM.mean(dim=-2)
    advantages_BT, _ = gae(given.rewards_BT, tv_worst_case(theta_BTM, 0.3), given.mask_BT, 1.0, 0.95)
    ours, targets = estimate("rfqi_ppo", given, "advantage.law.radius=0.3")
    torch.testing.assert_close(ours, advantages_BT)
    torch.testing.assert_close(targets, estimate("dvpo_plain", given)[1])


def test_dvpo_is_dvpo_plain_with_a_rank_in_place_of_the_mean_and_dvpo_rank_is_dvpo() -> None:
    mean = load_config({"algorithm": "dvpo"}, ["advantage.law.functional=mean"])
    assert dataclasses.replace(mean, algorithm="dvpo_plain") == load_config({"algorithm": "dvpo_plain"})
    ranked = load_config({"algorithm": "dvpo"})
    assert ranked.advantage.law.functional == "rank"
    assert dataclasses.replace(load_config({"algorithm": "dvpo_rank"}), algorithm="dvpo") == ranked
    rows = [ALGORITHMS[name] for name in ("dvpo", "dvpo_plain", "dvpo_rank")]
    assert len({(row.estimate, row.critic_loss, row.actor_loss) for row in rows}) == 1


def test_rloo_is_n_over_n_minus_1_times_the_centred_reward() -> None:
    given = signals()
    rloo, centred = estimate("rloo", given)[0], estimate("dr_grpo", given)[0]
    # Three rewards in the first group, two in the second (one is missing).
    factor_B = torch.tensor([3 / 2, 3 / 2, 3 / 2, 2, 2, 2]).unsqueeze(-1)
    torch.testing.assert_close(rloo, centred * factor_B)


def test_the_ladder_switches_on_one_group_of_terms_after_the_other() -> None:
    ladder = ("dvpo_plain", "dvpo_cons", "dvpo_cons_tail", "dvpo_cons_tail_shift", "dvpo_paper")
    on = [
        {f.name for f in dataclasses.fields(w) if getattr(w, f.name) == 0.1}
        for w in (load_config({"algorithm": name}).critic.weights for name in ladder)
    ]
    steps = [after - before for before, after in zip([set(), *on], on, strict=False)]
    assert steps == [set(), {"consistency"}, {"risk", "cvar", "gain"}, {"shift"}, {"shape", "curvature"}]


# Groups


@pytest.mark.parametrize("name", ["grpo", "grpo_rank", "dr_grpo", "rloo"])
def test_group_rows_ignore_a_missing_reward_whatever_stands_there(name: str) -> None:
    given = signals()
    wild = dataclasses.replace(given, rewards_BT=given.rewards_BT.clone())
    wild.rewards_BT[5, 3] = 1e6
    torch.testing.assert_close(estimate(name, wild)[0], estimate(name, given)[0])
    assert not estimate(name, given)[0][5].any()


def test_grpo_divides_by_the_sample_deviation_of_the_group() -> None:
    # First group 1, 0, 0: mean 1/3, sample variance (4/9 + 1/9 + 1/9) / 2 = 1/3. Second group 2, 1 (one missing):
    # mean 3/2, sample variance (1/4 + 1/4) / 1 = 1/2.
    advantages_BT, targets = estimate("grpo", signals())
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0.5, -0.5, 0])
    scale = torch.tensor([1 / 3] * 3 + [1 / 2] * 3).sqrt() + 1e-4
    torch.testing.assert_close(advantages_BT[:, 0], expected / scale)
    assert targets.shape[-1] == 0


def test_group_rank_counts_wins_and_half_the_ties_against_the_others() -> None:
    # 1 beats both zeros: 1 - 1/2. A zero loses to 1 and ties with the other zero: (0 + 1/2) / 2 - 1/2 = -1/4.
    rewards, groups = torch.tensor([1.0, 0, 0, 5, 7]), torch.tensor([0, 0, 0, 1, 1])
    present = torch.tensor([1, 1, 1, 1, 0])
    torch.testing.assert_close(group_rank(rewards, groups, present), torch.tensor([0.5, -0.25, -0.25, 0, 0]))
    monotone = group_rank(rewards.exp() * 3 - 1, groups, present)
    torch.testing.assert_close(monotone, torch.tensor([0.5, -0.25, -0.25, 0, 0]))


def test_reinforce_pp_sums_the_rewards_still_to_come() -> None:
    given = signals()
    rewards_BT = torch.where(given.mask_BT, torch.arange(24.0).view(6, 4), 0)
    advantages_BT, _ = estimate("reinforce_pp", dataclasses.replace(given, rewards_BT=rewards_BT))
    # Row 1 has rewards 4, (gap), 6, 7: 17 from its first token on, 13 from the third, 7 at the last.
    torch.testing.assert_close(advantages_BT[1], torch.tensor([17.0, 0, 13, 7]))


# Laws


def test_rank_rows_compare_the_actors_target_law_with_the_predicted_one() -> None:
    given = signals()
    theta_BTM = given.values_BTNM.mean(dim=-2).sort(dim=-1).values
    ours, targets = estimate("dvpo", given)
    torch.testing.assert_close(ours, rank_advantage(targets, theta_BTM) * given.mask_BT)
    assert ours.abs().max() <= 0.5


def test_a_spectral_functional_is_gae_on_its_value() -> None:
    given = signals()
    value_BT = cvar(given.values_BTNM.mean(dim=-2), 0.3)
    ours, _ = estimate("dvpo_plain", given, "advantage.law.functional=cvar", "advantage.law.lower=0.3")
    torch.testing.assert_close(ours, gae(given.rewards_BT, value_BT, given.mask_BT, 1.0, 0.95)[0])


def test_clipped_deltas_bound_the_advantage_and_leave_the_critics_target_alone() -> None:
    given = signals(num_heads=1, num_quantiles=1)
    spiked = dataclasses.replace(given, rewards_BT=given.rewards_BT * 100)
    clipped, targets = estimate("ppo_delta_clip", spiked)
    # |A| <= sum of at most four deltas of size 1 with weights .95^n: 1 + .95 + .9025 + .857 = 3.71
    assert 1 < clipped.abs().max() <= 3.71
    torch.testing.assert_close(targets, estimate("ppo", spiked)[1])
    assert estimate("ppo", spiked)[0].abs().max() > 50


# Noise taken out, by estimated rates


DENOISED = ("reward.trusted=0.1", "advantage.law.functional=denoised")
NOISE = Rates(false_positive=0.1, false_negative=0.3)


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
        advantages_BT, targets = estimate(name, given, *DENOISED)
        rewards_BT = correct_rewards(given.rewards_BT, given.mask_BT, given.rewarded_B, NOISE)
        expected, _ = gae(rewards_BT, value(given.values_BTNM.mean(dim=-2)), given.mask_BT, 1.0, 0.95)
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


# Shaped rewards


def shape(norm: str, clip: float | None = None, correction: str = "none", rates: Rates = NO_RATES) -> Tensor:
    given = signals()
    settings = RewardConfig(norm=norm, clip=clip, correction=correction)  # type: ignore[arg-type]
    return shape_rewards(given.rewards_BT, given.mask_BT, given.groups_B, given.rewarded_B, settings, identity, rates)


def test_group_normalised_returns_have_mean_0_and_deviation_1_in_each_group() -> None:
    returns_B = shape("group").sum(dim=-1)
    torch.testing.assert_close(returns_B[:3].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns_B[:3].std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert returns_B[5] == 0  # missing, and in nobody's mean
    torch.testing.assert_close(returns_B[3], -returns_B[4])


def test_batch_normalised_returns_use_every_reward_there_is() -> None:
    returns_B = shape("batch").sum(dim=-1)[:5]
    # 1, 0, 0, 2, 1: mean 4/5, population variance 6/5 - 16/25 = 14/25
    expected = (torch.tensor([1.0, 0, 0, 2, 1]) - 0.8) / ((14 / 25) ** 0.5 + 1e-4)
    torch.testing.assert_close(returns_B, expected)


def test_the_robust_form_is_not_moved_by_one_outlier() -> None:
    rewards = torch.tensor([0.0, 1, 2, 3, 1000])
    location, scale = group_location_scale(rewards, torch.zeros(5).long(), torch.ones(5), robust=True)
    # median 2; deviations 2, 1, 0, 1, 998 with median 1
    torch.testing.assert_close(location, torch.full((5,), 2.0))
    torch.testing.assert_close(scale, torch.full((5,), 1.4826))
    plain = group_location_scale(rewards, torch.zeros(5).long(), torch.ones(5))
    assert plain[0][0] > 200


def test_many_rewards_of_one_response_are_normalised_as_its_return_is() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    rewards = torch.tensor([[1.0, 0, 2], [0, 0, 1]])
    arguments = (mask, torch.tensor([0, 0]), torch.tensor([True, True]))
    shaped = shape_rewards(rewards, *arguments, RewardConfig(norm="group"), identity)
    # returns 3 and 1: mean 2, sample std sqrt 2
    scale = 2**0.5 + 1e-4
    torch.testing.assert_close(shaped.sum(dim=-1), torch.tensor([1.0, -1]) / scale)
    torch.testing.assert_close(shaped[0, 0], torch.tensor(1 / scale))


def test_the_last_tokens_below_the_limit_cost_in_proportion() -> None:
    # Limit 10, margin 4: free up to 6 tokens, then a quarter each.
    lengths_B = torch.tensor([0, 6, 7, 9, 10])
    torch.testing.assert_close(overlong_penalties(lengths_B, 10, 4), torch.tensor([0, 0, 0.25, 0.75, 1]))


def test_a_penalty_lowers_what_is_corrected_and_is_normalised_with_it() -> None:
    given = signals()
    penalties_B = torch.tensor([0.5, 0, 0.25, 0, 0, 1.0])
    fixed = (given.mask_BT, given.groups_B, given.rewarded_B)

    def returns(reward: RewardConfig, penalties_B: Tensor | None) -> Tensor:
        return shape_rewards(given.rewards_BT, *fixed, reward, identity, NOISE, penalties_B).sum(dim=-1)

    corrected = returns(RewardConfig(correction="backward"), None)
    lowered = returns(RewardConfig(correction="backward"), penalties_B)
    torch.testing.assert_close(lowered, corrected - penalties_B * given.rewarded_B)  # a missing reward stays 0
    normalised = returns(RewardConfig(correction="backward", norm="group"), penalties_B)[:3]
    torch.testing.assert_close(normalised, (lowered[:3] - lowered[:3].mean()) / (lowered[:3].std() + 1e-4))


def test_a_run_takes_the_penalty_from_what_is_learnt_and_not_from_what_was_observed(tmp_path: Path) -> None:
    figures = {}
    for margin in (0, 12):
        folder = tmp_path / str(margin)
        trainer = Trainer(run_config(folder, "algorithm=ppo", f"reward.overlong={margin}"), task=Parity())
        rollout, collected = trainer.collect()
        _, figures[margin] = trainer.estimate(rollout)
        trainer.close()
    # Of 12 tokens at most the penalty is length / 12.
    lengths_B = torch.tensor([len(episode.tokens) for episode in collected.episodes]).float()
    assert figures[12]["reward/overlong"] == pytest.approx(float(lengths_B.mean() / 12))
    assert figures[12]["reward/observed"] == figures[0]["reward/observed"]
    weighted = float((lengths_B * lengths_B / 12).sum() / lengths_B.sum())  # every token of a response has its return
    lost = figures[0]["critic/return_mean"] - figures[12]["critic/return_mean"]
    assert lost == pytest.approx(weighted, abs=1e-5)


def test_clipping_comes_last() -> None:
    assert shape("none", clip=0.5).max() == 0.5
    assert shape("group", clip=0.5).abs().max() == 0.5


def test_the_robust_form_falls_back_where_most_of_a_group_agrees() -> None:
    # Binary rewards, two of eight right: the median deviation is 0, the sample std sqrt(8/8 * 3/16 * 8/7) = .463.
    rewards = torch.tensor([0.0, 0, 0, 1, 0, 0, 1, 0])
    _, scale = group_location_scale(rewards, torch.zeros(8).long(), torch.ones(8), robust=True)
    torch.testing.assert_close(scale, torch.full((8,), (3 / 14) ** 0.5))


def test_the_rank_of_mixture_targets_reads_their_spread() -> None:
    given = signals()
    indexwise, _ = estimate("dvpo", given, "advantage.lam=0.5")
    mixture, targets = estimate("dvpo", given, "advantage.lam=0.5", "advantage.target=mixture")
    theta_BTM = given.values_BTNM.mean(dim=-2).sort(dim=-1).values
    torch.testing.assert_close(mixture, rank_advantage(targets, theta_BTM) * given.mask_BT)
    assert not torch.equal(mixture, indexwise)


# Every row in the trainer


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_trains_and_moves_the_policy_with_finite_figures(name: str, tmp_path: Path) -> None:
    trainer = Trainer(run_config(tmp_path / "run", f"algorithm={name}"), task=Parity())
    before = [p.clone() for p in trainer.policy.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.model.parameters(), strict=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [v for row in rows for key, v in row.items() if key.endswith(("/loss", "/grad_norm"))]
    assert losses
    assert None not in losses  # null stands for NaN and infinity


def test_defaults_of_a_row_stand_below_the_users_own_settings() -> None:
    config: Config = load_config({"algorithm": "dr_grpo", "actor": {"aggregation": "token_mean"}})
    assert config.actor.aggregation == "token_mean"
    assert not config.advantage.whiten
