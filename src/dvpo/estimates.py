"""From rewards and values to advantages and critic targets: compositions of `core` that algorithm rows choose from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvpo.core import risk
from dvpo.core.backends import ascending
from dvpo.core.masks import Reduce, masked_mean, masked_variance, zero_masked
from dvpo.core.returns import (
    GROUP_STD_EPS,
    distributional_targets,
    gae,
    group_location_scale,
    mixture_targets,
)
from dvpo.noise_rates import NO_RATES, Rates

if TYPE_CHECKING:  # config.py imports the rows to merge their defaults
    from dvpo.config import Config
    from dvpo.settings import RewardConfig
    from dvpo.settings_learning import AdvantageConfig, LawConfig

NO_SPREAD = 1e-6
"""Returns that deviate by no more are taken for equal."""


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


# Rewards


def shape_rewards(
    rewards_BT: Tensor,
    mask_BT: Tensor,
    groups_B: Tensor,
    rewarded_B: Tensor,
    settings: "RewardConfig",
    reduce: Reduce,
    rates: Rates = NO_RATES,
    penalties_B: Tensor | None = None,
) -> Tensor:
    """Correct, lower, normalise and clip observed rewards before any critic or baseline sees them.

        r -> (r - p) / (1 - p - q) or r - (1 - q), then r - penalty, then (r - location) / scale of its group or of the
        global batch, then clipped to [-clip, clip]: each reward, or, once it is normalised, the return

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
    if settings.clip is None:
        return rewards_BT
    if settings.norm == "none":
        return rewards_BT.clamp(-settings.clip, settings.clip)
    # What was subtracted stands at the last token alone: clipped reward by reward it would be lost.
    returns_B = (rewards_BT * mask_BT).sum(dim=-1)
    beyond_B = returns_B.clamp(-settings.clip, settings.clip) - returns_B
    return rewards_BT + last_token(mask_BT) * (beyond_B * rewarded_B).unsqueeze(-1)


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


def last_token(mask_BT: Tensor) -> Tensor:
    """1 at the last policy token of each row, 0 elsewhere: [B, T] float32."""
    counted_BT = mask_BT.long().cumsum(dim=-1)
    return (mask_BT & (counted_BT == counted_BT[:, -1:])).float()


# The number that a row acts on: [..., N, M] -> [...]. A constant added to all atoms comes through as it is.


def mean_value(values: Tensor, settings: "AdvantageConfig") -> Tensor:
    """Mean over heads and atoms."""
    del settings
    return values.mean(dim=(-2, -1))


def least_head_value(values: Tensor, settings: "AdvantageConfig") -> Tensor:
    """The least of the heads' means."""
    del settings
    return values.mean(dim=-1).amin(dim=-1)


def law_value(values: Tensor, settings: "AdvantageConfig") -> Tensor:
    """What `advantage.law` makes of the ensemble's sorted atoms; the mean beside a rank, which is no value."""
    if settings.law.functional == "rank":
        return mean_value(values, settings)
    theta = ascending(values.mean(dim=-2))
    return risk.spectral_value(theta, law_weights(settings.law, theta.shape[-1]))


def recentred(
    signals: Signals,
    value: Callable[[Tensor, "AdvantageConfig"], Tensor],
    cut_B: Tensor,
    settings: "AdvantageConfig",
    reduce: Reduce,
) -> Signals:
    """The signals with a constant c added to all values of the step, so that responses end as was expected of them.

        c = mean_b (r_T - V(s_T))

    over the responses with a reward that came to their end. Their mean last difference is 0 then. It takes nothing from
    what the critic tells two states apart. Left where it is, and with lambda < 1, the error pays or punishes the ending
    of a response as such, and the policy learns to stop at once or never.

    Where the length limit cut a response, V(s_{T+1}) moves with the others, and c changes its last difference as it
    does that between any two tokens: by (1 - gamma) c, little or nothing beside what the difference scatters. Divided
    by so small a number, that would be most of c where few responses end. If none does, c = 0.

    Args:
        signals: of the step.
        value: the number that the row acts on.
        cut_B: responses whose last state is worth V(s_{T+1}).
        settings: of the advantage.
        reduce: sums over processes.
    """
    values_BT = value(signals.values_BTNM, settings)
    deltas_B = ((signals.rewards_BT - values_BT) * last_token(signals.mask_BT)).sum(dim=-1)
    shift = masked_mean(deltas_B, signals.rewarded_B & signals.mask_BT.any(dim=-1) & ~cut_B, reduce)
    return replace(
        signals,
        values_BTNM=signals.values_BTNM + shift,
        bootstrap_BNM=signals.bootstrap_BNM + shift * cut_B.view(-1, 1, 1),
    )


# With a scalar critic


def scalar_estimate(signals: Signals, config: "Config") -> tuple[Tensor, Tensor]:
    """GAE on V = the mean over heads; the target is the lambda-return."""
    return _scalar_gae(signals, config.advantage, mean_value)


def pessimistic_estimate(signals: Signals, config: "Config") -> tuple[Tensor, Tensor]:
    """GAE with the least head as baseline and as bootstrap: the robust Bellman target min_i V_i."""
    return _scalar_gae(signals, config.advantage, least_head_value)


def _scalar_gae(
    signals: Signals, settings: "AdvantageConfig", value: Callable[[Tensor, "AdvantageConfig"], Tensor]
) -> tuple[Tensor, Tensor]:
    values_BT, bootstrap_B = value(signals.values_BTNM, settings), value(signals.bootstrap_BNM, settings)
    _, returns_BT = _gae(signals, values_BT, bootstrap_B, settings, critic_lam(settings))
    if settings.law.functional == "denoised":
        signals = _corrected(signals)
        values_BT, bootstrap_B = (risk.noise_corrected_value(v, *signals.rates) for v in (values_BT, bootstrap_B))
    signals = trusted_rewards(signals, values_BT, bootstrap_B, settings.gamma)
    advantages_BT, _ = _gae(signals, values_BT, bootstrap_B, settings, settings.lam, settings.delta_clip)
    return advantages_BT, returns_BT.unsqueeze(-1)


def reward_trust(settings: "AdvantageConfig", step: int) -> float:
    """w of a step, from 1 on: `reward_trust` at first, and 1 after `doubt_steps` steps, in a straight line between.

    The noise of n rewards that share a fact falls as 1/n, what the critic does not explain stays: doubt has its time
    at the beginning.
    """
    if settings.doubt_steps is None:
        return settings.reward_trust
    return 1 - (1 - settings.reward_trust) * max(0.0, 1 - (step - 1) / settings.doubt_steps)


def trusted_rewards(signals: Signals, values_BT: Tensor, bootstrap_B: Tensor, gamma: float) -> Signals:
    """For the actor: the last temporal difference of a response, which alone brings its verdict, times `reward_trust`.

        r_T -> w r_T + (1 - w) (V(s_T) - gamma V(s_{T+1})),   so that   delta_T -> w delta_T

    With lambda = 1 the return R becomes w R + (1 - w) V(s_T): what the critic says of the finished response, corrected
    by a share w of what was observed. Unlike lambda < 1 it weighs every token of a response alike. w = 1 changes
    nothing; w = 0 is what `missing_reward: bootstrap` does to a response without a reward. Targets keep r_T.
    """
    if (trust := signals.reward_trust) == 1:
        return signals
    expected_BT = values_BT - gamma * bootstrap_B.unsqueeze(-1)
    mixed_BT = trust * signals.rewards_BT + (1 - trust) * expected_BT
    at_end_BT = last_token(signals.mask_BT).bool()
    return replace(signals, rewards_BT=torch.where(at_end_BT, mixed_BT, signals.rewards_BT))


def _corrected(signals: Signals) -> Signals:
    """For the actor beside a denoised value. The critic's targets keep the observed reward: its law is trimmed, and
    a corrected one would be denoised twice."""
    rewards_BT = correct_rewards(signals.rewards_BT, signals.mask_BT, signals.rewarded_B, signals.rates)
    return replace(signals, rewards_BT=rewards_BT)


def _gae(
    signals: Signals,
    values_BT: Tensor,
    bootstrap_B: Tensor,
    settings: "AdvantageConfig",
    lam: float,
    delta_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    return gae(
        signals.rewards_BT,
        values_BT,
        signals.mask_BT,
        settings.gamma,
        lam,
        bootstrap=bootstrap_B,
        zero_last_delta=signals.zero_last_delta_B,
        delta_clip=delta_clip,
    )


# With a law


def distributional_estimate(signals: Signals, config: "Config") -> tuple[Tensor, Tensor]:
    """Distributional GAE on the ensemble's sorted quantiles; `advantage.law` makes a number of the law.

    `mean` is the paper's: the mean over the quantiles of A_tj. `rank` compares the target law with the predicted
    one. Every other functional is a weighting of the sorted atoms, and the advantage is GAE on that value; of the
    corrected reward where the value is denoised.
    """
    settings = config.advantage
    theta_BTM = ascending(signals.values_BTNM.mean(dim=-2))
    bootstrap_BM = ascending(signals.bootstrap_BNM.mean(dim=-2))

    def targets_at(lam: float, zeroed_B: Tensor = signals.zero_last_delta_B, out: Tensor | None = None) -> Tensor:
        given = (signals.rewards_BT, theta_BTM, signals.mask_BT, settings.gamma, lam)
        if settings.target == "mixture":
            return mixture_targets(
                *given,
                settings.target_atoms,
                signals.seed,
                bootstrap_BM,
                zero_last_delta=zeroed_B,
                tokens_before=signals.tokens_before,
            )
        return distributional_targets(*given, bootstrap_BM, zero_last_delta=zeroed_B, out=out)

    if settings.law.functional == "rank":
        targets_BTL = targets_at(critic_lam(settings))
        same = critic_lam(settings) == settings.lam
        compared_BTL = targets_BTL if same else targets_at(settings.lam)
        if (trust := signals.reward_trust) != 1:
            # The last difference of every atom w times, which is linear: a mean in its place would be one value where
            # the law has several, and right and wrong would have one rank.
            unmoved_BTL = targets_at(settings.lam, torch.ones_like(signals.zero_last_delta_B))
            compared_BTL = torch.lerp(unmoved_BTL, compared_BTL, trust)
        advantages_BT = risk.rank_advantage(compared_BTL, theta_BTM, settings.law.width)
        return zero_masked(advantages_BT, signals.mask_BT), targets_BTL
    weights_M = law_weights(settings.law, theta_BTM.shape[-1], signals.rates)
    values_BT, bootstrap_B = (risk.spectral_value(atoms, weights_M) for atoms in (theta_BTM, bootstrap_BM))
    acting = _corrected(signals) if settings.law.functional == "denoised" else signals
    acting = trusted_rewards(acting, values_BT, bootstrap_B, settings.gamma)
    advantages_BT, _ = _gae(acting, values_BT, bootstrap_B, settings, settings.lam, settings.delta_clip)
    return advantages_BT, targets_at(critic_lam(settings), out=theta_BTM)  # theta has served


def mean_target_estimate(signals: Signals, config: "Config") -> tuple[Tensor, Tensor]:
    """Advantages as above; the critic's target is the mean of the target law, which is the scalar lambda-return."""
    advantages_BT, targets_BTL = distributional_estimate(signals, config)
    return advantages_BT, targets_BTL.mean(dim=-1, keepdim=True)


def law_weights(law: "LawConfig", num_atoms: int, rates: Rates = NO_RATES) -> Tensor:
    """The weights [M] of the sorted atoms for a functional that is one; `rank` is none."""
    match law.functional:
        case "mean":
            return torch.full((num_atoms,), 1 / num_atoms, dtype=torch.float64)
        case "cvar":
            return risk.cvar_weights(num_atoms, law.lower)
        case "upper_mean":
            return risk.upper_weights(num_atoms, law.upper)
        case "trimmed":
            return risk.trimmed_weights(num_atoms, law.lower, law.upper)
        case "denoised":
            return risk.trimmed_weights(num_atoms, lo=rates.false_negative, hi=rates.false_positive)
        case "wang":
            return risk.wang_weights(num_atoms, law.eta)
        case "tv_worst_case":
            return risk.tv_weights(num_atoms, law.radius)
        case "rank":
            raise ValueError("the rank advantage is no weighting of atoms")


def critic_lam(settings: "AdvantageConfig") -> float:
    """lambda of the critic's targets."""
    return settings.lam if settings.critic_lam is None else settings.critic_lam


# Without a critic


GroupAdvantage = Callable[[Tensor, Tensor, Tensor], Tensor]


def group_estimate(advantage: GroupAdvantage) -> Callable[[Signals, "Config"], tuple[Tensor, Tensor]]:
    """One advantage a response, from its return and those of its group, the same at every token."""

    def estimate(signals: Signals, config: "Config") -> tuple[Tensor, Tensor]:
        del config
        returns_B = (signals.rewards_BT * signals.mask_BT).sum(dim=-1)
        advantages_B = advantage(returns_B, signals.groups_B, signals.rewarded_B)
        return advantages_B.unsqueeze(-1) * signals.mask_BT, _no_targets(signals)

    return estimate


def return_to_go_estimate(signals: Signals, config: "Config") -> tuple[Tensor, Tensor]:
    """The sum of later rewards (KL penalties among them) at each token, gamma = 1 (REINFORCE++)."""
    del config
    zeros_BT = torch.zeros_like(signals.rewards_BT)
    _, returns_BT = gae(signals.rewards_BT, zeros_BT, signals.mask_BT, gamma=1.0, lam=1.0)
    return returns_BT, _no_targets(signals)


def _no_targets(signals: Signals) -> Tensor:
    return signals.rewards_BT.new_zeros(*signals.mask_BT.shape, 0)
