"""Shaped rewards: normalised by group or batch, robustly, clipped last, penalised where they are overlong."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvpo.core.masks import identity
from dvpo.core.returns import group_location_scale
from dvpo.settings import RewardConfig
from dvpo.shaping import last_token, overlong_penalties, shape_rewards
from dvpo.trainer import Trainer
from responses import NOISE, shape, signals
from runs import Parity, run_config


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
    torch.testing.assert_close(location, torch.full((5,), 2.0).double())
    torch.testing.assert_close(scale, torch.full((5,), 1.4826, dtype=torch.float64))
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
        trainer = Trainer(run_config(folder, "algorithm=ppo", f"reward.overlong={margin}"), task=Parity([None]))
        rollout, collected = trainer.collect()
        _, figures[margin] = trainer.estimate(rollout)
        trainer.close()
    # Of 12 tokens at most the penalty is length / 12; the first response has no reward and counts in nothing.
    lengths_B = torch.tensor([len(episode.tokens) for episode in collected.episodes[1:]]).float()
    assert figures[12]["reward/overlong"] == pytest.approx(float(lengths_B.mean() / 12))
    assert figures[12]["reward/observed"] == figures[0]["reward/observed"]
    weighted = float((lengths_B * lengths_B / 12).sum() / lengths_B.sum())  # every token of a response has its return
    lost = figures[0]["critic/return_mean"] - figures[12]["critic/return_mean"]
    assert lost == pytest.approx(weighted, abs=1e-5)


@pytest.mark.parametrize("norm", ["group", "group_robust", "batch"])
def test_where_all_returns_are_equal_nothing_is_left_of_them_and_turns_keep_their_rewards(norm: str) -> None:
    given = signals()
    rewards_BT = torch.zeros(6, 4)
    rewards_BT[:, 0] = 0.5  # a turn's reward, and the last token's makes a return of .75 for everybody
    rewards_BT += 0.25 * last_token(given.mask_BT)
    rewards_BT[0, [0, 3]] = torch.tensor([0.1, 0.65])  # .75 but for float32's rounding, 2e-8: no spread to divide by
    rewards_BT *= given.rewarded_B.unsqueeze(-1)
    settings = RewardConfig(norm=norm)  # type: ignore[arg-type]
    shaped_BT = shape_rewards(rewards_BT, given.mask_BT, given.groups_B, given.rewarded_B, settings, identity)
    torch.testing.assert_close(shaped_BT.sum(dim=-1), torch.zeros(6), atol=1e-5, rtol=0)
    assert shaped_BT.abs().max() <= 0.75


@pytest.mark.parametrize("norm", ["group", "group_robust", "batch"])
def test_far_from_0_equal_returns_become_0_and_others_what_they_are_about_0(norm: str) -> None:
    mask_BT, groups_B, rewarded_B = torch.ones(8, 1).bool(), torch.zeros(8).long(), torch.ones(8).bool()

    def shaped(rewards_B: Tensor) -> Tensor:
        settings = RewardConfig(norm=norm)  # type: ignore[arg-type]
        return shape_rewards(rewards_B.unsqueeze(-1), mask_BT, groups_B, rewarded_B, settings, identity).squeeze(-1)

    assert (shaped(torch.full((8,), 20000.3)) == 0).all()
    # Sixteenths are exact in float32 up to 2^20, and so are their sums: nothing may depend on the offset.
    sixteenths_B = torch.tensor([0, 1, 1, 2, 3, 5, 8, 13]) / 16
    torch.testing.assert_close(shaped(1e4 + sixteenths_B), shaped(sixteenths_B), rtol=1e-6, atol=1e-6)


def test_a_normalised_return_is_clipped_as_a_whole() -> None:
    # Returns 4 and 0, each in four rewards: normalised 1 and -1 (sample deviation 2.83: .7071), clipped to .5 and -.5.
    mask_BT = torch.ones(2, 4, dtype=torch.bool)
    rewards_BT, groups_B, rewarded_B = torch.tensor([[1.0] * 4, [0.0] * 4]), torch.zeros(2).long(), torch.ones(2).bool()
    settings = RewardConfig(norm="group", clip=0.5)
    shaped_BT = shape_rewards(rewards_BT, mask_BT, groups_B, rewarded_B, settings, identity)
    torch.testing.assert_close(shaped_BT.sum(dim=-1), torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(shaped_BT[0, :3], torch.full((3,), 1 / (8**0.5 + 1e-4)))  # what came before is unclipped


def test_a_floor_lifts_low_returns_at_their_last_token_and_no_missing_one() -> None:
    # Two prompts of two responses, four tokens each; the last reward is missing.
    rewards_BT = torch.tensor([[1.0, 0, 0, -4], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    mask_BT, groups_B = torch.ones(4, 4, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    rewarded_B = torch.tensor([True, True, True, False])

    def shaped(settings: RewardConfig) -> Tensor:
        return shape_rewards(rewards_BT, mask_BT, groups_B, rewarded_B, settings, identity)

    # The return of -3 becomes .5, by 3.5 at its end; that of 2 stays; 0 becomes .5; what is missing stays 0.
    expected = torch.tensor([[1.0, 0, 0, -0.5], [0, 0, 0, 2], [0, 0, 0, 0.5], [0, 0, 0, 0]])
    torch.testing.assert_close(shaped(RewardConfig(floor=0.5)), expected)
    # The first group's returns -3 and 2 are normalised to -.707 and .707: a clip of .6 bounds both, a floor the lower.
    both = shaped(RewardConfig(norm="group", clip=0.6, floor=-0.2)).sum(dim=-1)
    torch.testing.assert_close(both[:2], torch.tensor([-0.2, 0.6]))
    torch.testing.assert_close(shaped(RewardConfig(norm="group", floor=-0.2)).sum(dim=-1)[0], torch.tensor(-0.2))


def test_a_floor_above_the_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reward.floor = 2 is above reward.clip = 1: lower it"):
        RewardConfig(clip=1.0, floor=2.0)


def test_clipping_comes_last() -> None:
    assert shape("none", clip=0.5).max() == 0.5
    given = signals()
    lost = shape_rewards(
        -given.rewards_BT, given.mask_BT, given.groups_B, given.rewarded_B, RewardConfig(clip=0.5), identity
    )
    assert lost.min() == -0.5
    assert shape("group", clip=0.5).abs().max() == 0.5


def test_the_robust_form_falls_back_where_most_of_a_group_agrees() -> None:
    # Binary rewards, two of eight right: the median deviation is 0, the sample std sqrt(8/8 * 3/16 * 8/7) = .463.
    rewards = torch.tensor([0.0, 0, 0, 1, 0, 0, 1, 0])
    _, scale = group_location_scale(rewards, torch.zeros(8).long(), torch.ones(8), robust=True)
    torch.testing.assert_close(scale, torch.full((8,), (3 / 14) ** 0.5, dtype=torch.float64))


def test_robustly_normalised_returns_are_off_the_median_in_units_of_the_median_deviation() -> None:
    # Group 1, 0, 0: median 0; most agree, so the scale is the sample deviation, sqrt(1/3). Group 2, 1 (one missing):
    # median 3/2, median deviation 1/2, scale .7413. About the mean, as `group` has it, the first would be 2/3.
    one, two = 1 / ((1 / 3) ** 0.5 + 1e-4), 0.5 / (0.5 * 1.4826 + 1e-4)
    torch.testing.assert_close(shape("group_robust").sum(dim=-1), torch.tensor([one, 0, 0, two, -two, 0]))
