"""From signals to advantages and critic targets: compositions of `core` that algorithm rows choose from."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dvpo.config import Config
from dvpo.core import risk
from dvpo.core.backends import ascending
from dvpo.core.masks import Reduce, masked_mean, zero_masked
from dvpo.core.returns import distributional_targets, gae, mixture_targets
from dvpo.settings_learning import AdvantageConfig, LawConfig
from dvpo.shaping import NO_RATES, Rates, Signals, correct_rewards, last_token

# The number that a row acts on: [..., N, M] -> [...]. A constant added to all atoms comes through as it is.


def mean_value(values: Tensor, settings: AdvantageConfig) -> Tensor:
    """Mean over heads and atoms."""
    del settings
    return values.mean(dim=(-2, -1))


def least_head_value(values: Tensor, settings: AdvantageConfig) -> Tensor:
    """The least of the heads' means."""
    del settings
    return values.mean(dim=-1).amin(dim=-1)


def law_value(values: Tensor, settings: AdvantageConfig) -> Tensor:
    """What `advantage.law` makes of the ensemble's sorted atoms; the mean beside a rank, which is no value."""
    if settings.law.functional == "rank":
        return mean_value(values, settings)
    return risk.spectral_value(values.mean(dim=-2), law_weights(settings.law, values.shape[-1]))


def recentred(
    signals: Signals,
    value: Callable[[Tensor, AdvantageConfig], Tensor],
    cut_B: Tensor,
    settings: AdvantageConfig,
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


def scalar_estimate(signals: Signals, config: Config) -> tuple[Tensor, Tensor]:
    """GAE on V = the mean over heads; the target is the lambda-return."""
    return _scalar_gae(signals, config.advantage, mean_value)


def pessimistic_estimate(signals: Signals, config: Config) -> tuple[Tensor, Tensor]:
    """GAE with the least head as baseline and as bootstrap: the robust Bellman target min_i V_i."""
    return _scalar_gae(signals, config.advantage, least_head_value)


def _scalar_gae(
    signals: Signals, settings: AdvantageConfig, value: Callable[[Tensor, AdvantageConfig], Tensor]
) -> tuple[Tensor, Tensor]:
    values_BT, bootstrap_B = value(signals.values_BTNM, settings), value(signals.bootstrap_BNM, settings)
    _, returns_BT = _gae(signals, values_BT, bootstrap_B, settings, critic_lam(settings))
    if settings.law.functional == "denoised":
        signals = _corrected(signals)
        values_BT, bootstrap_B = (risk.noise_corrected_value(v, *signals.rates) for v in (values_BT, bootstrap_B))
    signals = trusted_rewards(signals, values_BT, bootstrap_B, settings.gamma)
    advantages_BT, _ = _gae(signals, values_BT, bootstrap_B, settings, settings.lam, settings.delta_clip)
    return advantages_BT, returns_BT.unsqueeze(-1)


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
    settings: AdvantageConfig,
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


def distributional_estimate(signals: Signals, config: Config) -> tuple[Tensor, Tensor]:
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
        advantages_BT = risk.rank_advantage(compared_BTL, theta_BTM, settings.law.width, settings.law.floor)
        return zero_masked(advantages_BT, signals.mask_BT), targets_BTL
    weights_M = law_weights(settings.law, theta_BTM.shape[-1], signals.rates)
    values_BT, bootstrap_B = (risk.spectral_value(atoms, weights_M) for atoms in (theta_BTM, bootstrap_BM))
    acting = _corrected(signals) if settings.law.functional == "denoised" else signals
    acting = trusted_rewards(acting, values_BT, bootstrap_B, settings.gamma)
    advantages_BT, _ = _gae(acting, values_BT, bootstrap_B, settings, settings.lam, settings.delta_clip)
    return advantages_BT, targets_at(critic_lam(settings), out=theta_BTM)  # theta has served


def mean_target_estimate(signals: Signals, config: Config) -> tuple[Tensor, Tensor]:
    """Advantages as above; the critic's target is the mean of the target law, which is the scalar lambda-return."""
    advantages_BT, targets_BTL = distributional_estimate(signals, config)
    return advantages_BT, targets_BTL.mean(dim=-1, keepdim=True)


def law_weights(law: LawConfig, num_atoms: int, rates: Rates = NO_RATES) -> Tensor:
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


def critic_lam(settings: AdvantageConfig) -> float:
    """lambda of the critic's targets."""
    return settings.lam if settings.critic_lam is None else settings.critic_lam


# Without a critic


GroupAdvantage = Callable[[Tensor, Tensor, Tensor], Tensor]


def group_estimate(advantage: GroupAdvantage) -> Callable[[Signals, Config], tuple[Tensor, Tensor]]:
    """One advantage a response, from its return and those of its group, the same at every token."""

    def estimate(signals: Signals, config: Config) -> tuple[Tensor, Tensor]:
        del config
        returns_B = (signals.rewards_BT * signals.mask_BT).sum(dim=-1)
        advantages_B = advantage(returns_B, signals.groups_B, signals.rewarded_B)
        return advantages_B.unsqueeze(-1) * signals.mask_BT, _no_targets(signals)

    return estimate


def return_to_go_estimate(signals: Signals, config: Config) -> tuple[Tensor, Tensor]:
    """The sum of later rewards (KL penalties among them) at each token, gamma = 1 (REINFORCE++)."""
    del config
    zeros_BT = torch.zeros_like(signals.rewards_BT)
    _, returns_BT = gae(signals.rewards_BT, zeros_BT, signals.mask_BT, gamma=1.0, lam=1.0)
    return returns_BT, _no_targets(signals)


def _no_targets(signals: Signals) -> Tensor:
    return signals.rewards_BT.new_zeros(*signals.mask_BT.shape, 0)
