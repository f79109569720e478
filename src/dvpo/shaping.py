"""What a row estimates from: the rewards of a step as config shapes them, the critic's values, and what counts."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dvpo.batch import Rollout
from dvpo.config import Config
from dvpo.core.masks import Reduce, masked_mean, masked_variance
from dvpo.core.returns import GROUP_STD_EPS, group_location_scale
from dvpo.settings import RewardConfig
from dvpo.settings_learning import AdvantageConfig

NO_SPREAD = 1e-6
"""Returns that deviate by no more are taken for equal."""


class Rates(NamedTuple):
    """What a correction takes for the noise of a binary reward; both 0: it is taken for right."""

    false_positive: float = 0.0
    """p, probability that a wrong response is taken for a right one."""
    false_negative: float = 0.0
    """q, probability that a right response is taken for a wrong one."""


NO_RATES = Rates()


@dataclass(frozen=True)
class Signals:
    """What a row may use to estimate advantages and targets; shapes as in `dvpo.batch`."""

    rewards_BT: Tensor
    """Observed rewards, shaped as `config.reward` says, less the KL penalty where it is part of the reward."""
    mask_BT: Tensor
    """Tokens that train."""
    values_BTNM: Tensor
    """The critic's predictions at the states of the tokens (N = M = 0 without a critic)."""
    bootstrap_BNM: Tensor
    """The critic's predictions after the last token; 0 where the episode's end is worth 0."""
    zero_last_delta_B: Tensor
    """Sequences whose reward is missing and whose last temporal difference is therefore 0."""
    groups_B: Tensor
    """int64, equal for the responses to one prompt of this step."""
    rewarded_B: Tensor
    """Sequences that have a reward and train: those that count in group statistics."""
    seed: int
    """Of this step, for rows that draw."""
    tokens_before: int = 0
    """Tokens that train on processes of lower rank, for rows that draw."""
    rates: Rates = NO_RATES
    """What is believed of the noise, for values that are denoised."""
    reward_trust: float = 1.0
    """Share of each response's last temporal difference that the actor believes in this step (`reward_trust`)."""


def going_on(rollout: Rollout, settings: AdvantageConfig) -> Tensor:
    """Responses whose last state is worth V(s_{T+1}), since the length limit cut them: bool, [B]."""
    return rollout.truncated_B & (settings.truncation == "bootstrap")


def step_signals(
    rollout: Rollout,
    values_BTNM: Tensor,
    bootstrap_BNM: Tensor,
    config: Config,
    step: int,
    seed: int,
    reduce: Reduce,
    rates: Rates = NO_RATES,
    kl_BT: Tensor | None = None,
) -> Signals:
    """What a row estimates from, by the config's rules on rewards, truncation and missing supervision.

    Args:
        rollout: of the step.
        values_BTNM: the critic's predictions at the states of the tokens.
        bootstrap_BNM: those at the state after the last token, which count where the length limit cut a response and
            `advantage.truncation` is `bootstrap`.
        config: of the run.
        step: from 1 on.
        seed: for rows that draw.
        reduce: sums over processes.
        rates: what is believed of the noise.
        kl_BT: the penalty that is a part of the reward (`actor.kl.place`), coefficient included.
    """
    settings = config.advantage
    keep_B = torch.ones_like(rollout.rewarded_B)
    if settings.truncation == "mask":
        keep_B &= ~rollout.truncated_B
    if settings.missing_reward == "mask":
        keep_B &= rollout.rewarded_B
    mask_BT = rollout.mask_BT & keep_B.unsqueeze(-1)
    groups_B, counted_B = rollout.groups(), rollout.rewarded_B & keep_B
    fixed = (rollout.rewards_BT, rollout.mask_BT, groups_B, counted_B)
    rewards_BT = shape_rewards(*fixed, config.reward, reduce, rates, response_penalties(rollout, config)) * mask_BT
    return Signals(
        rewards_BT=rewards_BT if kl_BT is None else rewards_BT - kl_BT * mask_BT,
        mask_BT=mask_BT,
        values_BTNM=values_BTNM,
        bootstrap_BNM=torch.where(going_on(rollout, settings).view(-1, 1, 1), bootstrap_BNM, 0.0),
        zero_last_delta_B=~rollout.rewarded_B,
        groups_B=groups_B,
        rewarded_B=counted_B,
        seed=seed,
        rates=rates,
        reward_trust=reward_trust(settings, step),
    )


# Rewards


def shape_rewards(
    rewards_BT: Tensor,
    mask_BT: Tensor,
    groups_B: Tensor,
    rewarded_B: Tensor,
    settings: RewardConfig,
    reduce: Reduce,
    rates: Rates = NO_RATES,
    penalties_B: Tensor | None = None,
) -> Tensor:
    """Correct, lower, normalise and bound observed rewards before any critic or baseline sees them.

        r -> (r - p) / (1 - p - q) or r - (1 - q), then r - penalty, then (r - location) / scale of its group or of the
        global batch, then clipped to [-clip, clip]: each reward, or, once it is normalised, the return; then the
        return is lifted to `floor` at least

    Missing rewards stay 0 and count in nothing.
    """
    if settings.correction == "backward":
        rewards_BT = correct_rewards(rewards_BT, mask_BT, rewarded_B, rates)
    elif settings.correction == "forward":
        rewards_BT = forward_weights(rewards_BT, mask_BT, rewarded_B, rates)
    if penalties_B is not None:
        rewards_BT = _map_returns(rewards_BT, mask_BT, rewarded_B, penalties_B, torch.ones_like(penalties_B))
    if settings.norm != "none":
        returns_B = (rewards_BT * mask_BT).sum(dim=-1, dtype=torch.float64)
        if settings.norm == "batch":
            location_B = masked_mean(returns_B, rewarded_B, reduce).expand_as(returns_B)
            scale_B = masked_variance(returns_B, rewarded_B, reduce).sqrt().expand_as(returns_B)
        else:
            robust = settings.norm == "group_robust"
            location_B, scale_B = group_location_scale(returns_B, groups_B, rewarded_B, robust)
        # Without a spread every return is its location: a scale of 1 leaves 0 of it, and turns' rewards as they are.
        scale_B = torch.where(scale_B > NO_SPREAD, scale_B + GROUP_STD_EPS, 1.0)
        rewards_BT = _map_returns(rewards_BT, mask_BT, rewarded_B, location_B, scale_B)
    if settings.clip is not None and settings.norm == "none":
        rewards_BT = rewards_BT.clamp(-settings.clip, settings.clip)
    elif settings.clip is not None:
        # What was subtracted stands at the last token alone: clipped reward by reward it would be lost.
        rewards_BT = _bound_returns(rewards_BT, mask_BT, rewarded_B, -settings.clip, settings.clip)
    if settings.floor is not None:
        rewards_BT = _bound_returns(rewards_BT, mask_BT, rewarded_B, settings.floor)
    return rewards_BT


def response_penalties(rollout: Rollout, config: Config) -> Tensor | None:
    """What `reward.overlong` takes from each response, [B]; None where it is off."""
    margin, limit = config.reward.overlong, config.sampling.max_completion_length
    lengths_B = rollout.attention_BS[:, rollout.prompt_length :].sum(dim=-1)
    return overlong_penalties(lengths_B, limit, margin) if margin else None


def overlong_penalties(lengths_B: Tensor, limit: int, margin: int) -> Tensor:
    """What a response loses for its length: 0 up to limit - margin tokens, then in proportion, 1 at the limit.

    Source: DAPO, arXiv 2503.14476, soft overlong punishment.
    """
    return ((lengths_B - (limit - margin)) / margin).clamp(min=0.0, max=1.0)


def correct_rewards(rewards_BT: Tensor, mask_BT: Tensor, rewarded_B: Tensor, rates: Rates) -> Tensor:
    """Turn binary returns R into unbiased estimates of the true ones, (R - p) / (1 - p - q).

    Source: Natarajan et al. 2013; the "backward correction" of arXiv 2510.00915.
    """
    ones_B = rewards_BT.new_ones(len(rewards_BT))
    p, q = rates
    return _map_returns(rewards_BT, mask_BT, rewarded_B, p * ones_B, (1 - p - q) * ones_B)


def forward_weights(rewards_BT: Tensor, mask_BT: Tensor, rewarded_B: Tensor, rates: Rates) -> Tensor:
    """Turn binary returns R into weights of the score function that are 0 on average for a right response, R - (1 - q).

        w(1) = q, w(0) = -(1 - q):   E[w | right] = (1 - q) q - q (1 - q) = 0,   E[w | wrong] = -(1 - p - q)

    So E[w | truth] = (1 - p - q) (truth - 1), and E[w grad log pi] = (1 - p - q) grad E[truth], for the score has mean
    0: the direction is right, its length is not, and p need not be known.

    Source: the "forward correction" of arXiv 2510.00915.
    """
    ones_B = rewards_BT.new_ones(len(rewards_BT))
    return _map_returns(rewards_BT, mask_BT, rewarded_B, (1 - rates.false_negative) * ones_B, ones_B)


def _map_returns(
    rewards_BT: Tensor, mask_BT: Tensor, rewarded_B: Tensor, location_B: Tensor, scale_B: Tensor
) -> Tensor:
    """Turn each return R into (R - location) / scale, whether the response has one reward or many.

    Scale acts on every reward of a response, location on its last token.
    """
    # The difference first: it is small where location is large, and the quotients of both would have lost its digits.
    moved_BT = rewards_BT - last_token(mask_BT) * location_B.unsqueeze(-1)
    return (moved_BT / scale_B.unsqueeze(-1)).to(rewards_BT) * rewarded_B.unsqueeze(-1)


def _bound_returns(
    rewards_BT: Tensor, mask_BT: Tensor, rewarded_B: Tensor, low: float, high: float | None = None
) -> Tensor:
    """Take from the last token what a return has beyond its bounds."""
    returns_B = (rewards_BT * mask_BT).sum(dim=-1)
    beyond_B = returns_B - returns_B.clamp(low, high)
    return _map_returns(rewards_BT, mask_BT, rewarded_B, beyond_B, torch.ones_like(beyond_B))


def last_token(mask_BT: Tensor) -> Tensor:
    """1 at the last policy token of each row, 0 elsewhere: [B, T] float32."""
    counted_BT = mask_BT.long().cumsum(dim=-1)
    return (mask_BT & (counted_BT == counted_BT[:, -1:])).float()


def reward_trust(settings: AdvantageConfig, step: int) -> float:
    """w of a step, from 1 on: `reward_trust` at first, and 1 after `doubt_steps` steps, in a straight line between.

    The noise of n rewards that share a fact falls as 1/n, what the critic does not explain stays: doubt has its time
    at the beginning.
    """
    if settings.doubt_steps is None:
        return settings.reward_trust
    return 1 - (1 - settings.reward_trust) * max(0.0, 1 - (step - 1) / settings.doubt_steps)
