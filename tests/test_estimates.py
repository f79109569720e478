"""How rows compose core: pessimism, functionals of the law, groups; and the reductions between rows."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvpo.algorithms import ALGORITHMS
from dvpo.config import Config
from dvpo.core.backends import ascending
from dvpo.core.masks import identity
from dvpo.core.returns import gae, group_rank
from dvpo.core.risk import cvar, rank_advantage, tv_worst_case
from dvpo.estimates import law_value, least_head_value, mean_value, recentred
from dvpo.loading import load_config
from dvpo.shaping import Signals, last_token, reward_trust
from dvpo.trainer import Trainer
from responses import estimate, signals
from runs import Parity, run_config

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


NOBODY = torch.zeros(6, dtype=torch.bool)
VALUES = {"ppo": mean_value, "ppo_ensemble": mean_value, "dvpo": law_value, "dvpo_paper": law_value}
VALUES |= {"robust_ppo": least_head_value, "rfqi_ppo": law_value}


def recentre(name: str, given: Signals, cut_B: Tensor = NOBODY, gamma: float = 1.0) -> Signals:
    settings = load_config(overrides=[f"algorithm={name}", f"advantage.gamma={gamma}"]).advantage
    return recentred(given, ALGORITHMS[name].value, cut_B, settings, identity)


def ends(name: str, given: Signals) -> Tensor:
    """r_T - V(s_T) of the responses that have a reward."""
    values_BT = VALUES[name](given.values_BTNM, load_config(overrides=[f"algorithm={name}"]).advantage)
    return torch.stack([given.rewards_BT[at] - values_BT[at] for at in [(0, 3), (1, 3), (2, 2), (3, 1), (4, 3)]])


@pytest.mark.parametrize("name", VALUES)
def test_recentred_values_make_the_end_cost_nothing_and_no_constant_of_the_critic_matters(name: str) -> None:
    given = signals(num_quantiles=1 if "ppo" in name and name != "rfqi_ppo" else 5)
    moved = dataclasses.replace(given, values_BTNM=given.values_BTNM + 3.0)
    at_rest = recentre(name, given)
    torch.testing.assert_close(recentre(name, moved).values_BTNM, at_rest.values_BTNM, atol=1e-5, rtol=1e-5)
    assert abs(float(ends(name, at_rest).mean())) < 1e-6
    assert abs(float(ends(name, given).mean())) > 0.01
    shift = ends(name, given).mean().expand_as(given.values_BTNM)
    torch.testing.assert_close(at_rest.values_BTNM - given.values_BTNM, shift)
    torch.testing.assert_close(at_rest.bootstrap_BNM, given.bootstrap_BNM)


def test_recentring_moves_the_value_after_a_cut_with_the_others() -> None:
    # V = 1 everywhere but for an error of -1, so 0; two of four responses are cut, and worth 1 - 1 = 0 after it. The
    # ended two are 1 above what was expected, the cut ones as expected: c = (1 + 1) / 2 ended = 1.
    given = dataclasses.replace(
        signals(num_quantiles=1),
        rewards_BT=torch.tensor([[0.0, 0, 0, 1]] * 2 + [[0.0, 0, 0, 0]] * 4),
        mask_BT=torch.ones(6, 4, dtype=torch.bool),
        values_BTNM=torch.zeros(6, 4, 1, 1),
        bootstrap_BNM=torch.zeros(6, 1, 1),
        rewarded_B=torch.tensor([True] * 4 + [False] * 2),
    )
    cut_B = torch.tensor([False, False, True, True, False, False])
    fixed = recentre("ppo", given, cut_B)
    assert (fixed.values_BTNM == 1).all()
    assert fixed.bootstrap_BNM.flatten().tolist() == [0, 0, 1, 1, 0, 0]
    assert (estimate("ppo", fixed)[0][:4] == 0).all()  # whichever way a response ends, it is what was expected
    # Nobody came to an end: there is nothing to take out.
    for gamma in (1.0, 0.99):
        assert (recentre("ppo", given, ~NOBODY, gamma).values_BTNM == 0).all()


def test_recentring_takes_the_mean_over_all_processes() -> None:
    # V = 0, and four rewards here of sum 3, one of a response without a token left out; another process has three of
    # sum 4: c = 7 / 7.
    def with_another(tensor: Tensor) -> Tensor:
        return tensor + (4 if tensor.is_floating_point() else 3)  # a sum of rewards, a count of them

    given = dataclasses.replace(signals(num_quantiles=1), values_BTNM=torch.zeros(6, 4, 1, 1))
    given.mask_BT[0], given.rewards_BT[0] = False, 0
    settings = load_config(overrides=["algorithm=ppo"]).advantage
    assert (recentred(given, mean_value, NOBODY, settings, with_another).values_BTNM == 1).all()


@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_what_cut_responses_scatter_is_not_charged_to_the_few_that_ended(gamma: float) -> None:
    # One response of four ended, .5 above what was expected: c = .5. The values after the cuts scatter by 1 about those
    # before them, which c cannot change; divided by the one ending their sum, 3, would have made it 3.5.
    given = dataclasses.replace(
        signals(num_quantiles=1),
        rewards_BT=torch.tensor([[0.0, 0, 0, 0.5]] + [[0.0, 0, 0, 0]] * 5),
        mask_BT=torch.ones(6, 4, dtype=torch.bool),
        values_BTNM=torch.zeros(6, 4, 1, 1),
        bootstrap_BNM=torch.tensor([0.0, 1, 1, 1, 0, 0]).view(6, 1, 1),
        rewarded_B=torch.tensor([True] * 4 + [False] * 2),
    )
    cut_B = torch.tensor([False, True, True, True, False, False])
    assert (recentre("ppo", given, cut_B, gamma).values_BTNM == 0.5).all()


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
    # Half the last difference of every atom: G_j = theta_j(s_T) + (1 - theta_j(s_T)) / 2.
    mixed_M = 0.5 * 1.0 + 0.5 * theta_BTM[0, -1]
    wins = (mixed_M.unsqueeze(-1) > theta_BTM[0, 0]).float().mean()
    torch.testing.assert_close(advantages_BT[0, 0], wins - 0.5)
    torch.testing.assert_close(targets_BTL, estimate("dvpo", given, "advantage.lam=1")[1], rtol=0, atol=0)


def test_a_rank_that_trusts_half_a_binary_reward_still_tells_right_from_wrong_and_one_that_trusts_none_says_0() -> None:
    # The law of a coin: atoms 0 and 1. Half of the last difference: a 1 gives 1/2, 1 and a 0 gives 0, 1/2.
    given = signals(num_quantiles=2)
    atoms = torch.tensor([0.0, 1.0]).expand(6, 4, 3, 2).clone()
    for reward, expected in ((1.0, 0.125), (0.0, -0.125)):  # 1/2 beats 0: .5, 1 beats 0 and ties: .75; less 1/2
        rewards_BT = reward * last_token(given.mask_BT)
        coin = dataclasses.replace(given, values_BTNM=atoms, rewards_BT=rewards_BT)
        for trust, advantage in ((0.5, expected), (0.0, 0.0), (1.0, 2 * expected)):
            settings = ["advantage.lam=1", f"advantage.reward_trust={trust}"]
            advantages_BT, _ = estimate("dvpo", coin, *settings)
            assert advantages_BT[0].tolist() == pytest.approx([advantage] * 4), (reward, trust)


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
    assert not estimate(name, given)[0][~given.mask_BT].any()  # the whole response, and the gap in another


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


@pytest.mark.parametrize(
    ("functional", "settings", "value"),
    [
        # Atoms 0, 1, 2, 10, each of mass 1/4 (tests/core/test_risk.py has the same sums).
        ("mean", [], 13 / 4),
        ("cvar", ["lower=0.375"], 1 / 3),  # (1/4 * 0 + 1/8 * 1) / (3/8)
        ("upper_mean", ["upper=0.375"], 22 / 3),  # (1/4 * 10 + 1/8 * 2) / (3/8)
        ("trimmed", ["lower=0.125", "upper=0.25"], 6 / 5),  # (1/8 * 0 + 1/4 * 1 + 1/4 * 2) / (5/8)
        ("tv_worst_case", ["radius=0.375"], 1 / 2),  # 5/8 * 0 + 1/4 * 1 + 1/8 * 2
        # Phi(Phi^-1(j/4) + eta) = .530096, .773373, .922848, 1: weights .530096, .243277, .149475, .077152.
        ("wang", ["eta=0.75"], 1.313751),
        # The mirror image, eta < 0: weights .077152, .149475, .243277, .530096.
        ("wang", ["eta=-0.75"], 5.936986),
    ],
)
def test_each_functional_of_the_law_by_hand(functional: str, settings: list[str], value: float) -> None:
    given = signals(num_quantiles=4)
    atoms = torch.tensor([2.0, 10, 0, 1]).expand(6, 4, 3, 4).clone()  # unsorted, all heads alike
    overrides = [f"advantage.law.{setting}" for setting in (f"functional={functional}", *settings)]
    advantages_BT, _ = estimate("dvpo_plain", dataclasses.replace(given, values_BTNM=atoms), *overrides)
    assert advantages_BT[0, 3].item() == pytest.approx(1 - value, abs=1e-5)  # r_T - V(s_T), whatever lambda is


def test_clipped_deltas_bound_the_advantage_and_leave_the_critics_target_alone() -> None:
    given = signals(num_heads=1, num_quantiles=1)
    spiked = dataclasses.replace(given, rewards_BT=given.rewards_BT * 100)
    clipped, targets = estimate("ppo_delta_clip", spiked)
    # |A| <= sum of at most four deltas of size 1 with weights .95^n: 1 + .95 + .9025 + .857 = 3.71
    assert 1 < clipped.abs().max() <= 3.71
    torch.testing.assert_close(targets, estimate("ppo", spiked)[1])
    assert estimate("ppo", spiked)[0].abs().max() > 50


def test_a_floor_of_the_rank_reaches_the_actor_and_not_the_critic() -> None:
    given = signals()
    plain, floored = (estimate("dvpo", given, f"advantage.law.floor={floor}") for floor in (0, 0.6))
    theta_BTM = given.values_BTNM.mean(dim=-2).sort(dim=-1).values
    expected_BT = rank_advantage(plain[1], theta_BTM, floor=0.6)
    torch.testing.assert_close(floored[0], torch.where(given.mask_BT, expected_BT, 0.0))
    assert not torch.equal(floored[0], plain[0])
    assert torch.equal(floored[1], plain[1])


def test_the_rank_of_mixture_targets_reads_their_spread() -> None:
    given = signals()
    indexwise, _ = estimate("dvpo", given, "advantage.lam=0.5")
    mixture, targets = estimate("dvpo", given, "advantage.lam=0.5", "advantage.target=mixture")
    theta_BTM = given.values_BTNM.mean(dim=-2).sort(dim=-1).values
    torch.testing.assert_close(mixture, rank_advantage(targets, theta_BTM) * given.mask_BT)
    assert not torch.equal(mixture, indexwise)


def test_defaults_of_a_row_stand_below_the_users_own_settings() -> None:
    config: Config = load_config({"algorithm": "dr_grpo", "actor": {"aggregation": "token_mean"}})
    assert config.actor.aggregation == "token_mean"
    assert not config.advantage.whiten
