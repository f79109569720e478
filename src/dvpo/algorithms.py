"""The algorithms: one row each, composed of functions of `core`. No algorithm's name is tested anywhere else.

A row says which critic it wants, how advantages and critic targets are made from rewards and values, and what the
losses are. To bring your own, write an `Algorithm` and name it in the config: `algorithm: my_module:my_row`.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dvpo.core.losses import clipped_surrogate, value_loss
from dvpo.core.quantiles import quantile_levels
from dvpo.core.returns import distributional_gae, gae, mixture_targets
from dvpo.core.risk import critic_terms
from dvpo.errors import InputError

if TYPE_CHECKING:  # config.py imports this module to merge a row's defaults
    from dvpo.config import AdvantageConfig, Config


@dataclass(frozen=True)
class Signals:
    """What a row may use to estimate advantages and targets; shapes as in `dvpo.batch`."""

    rewards_BT: Tensor
    """Observed rewards, less the KL penalty where it is part of the reward."""
    mask_BT: Tensor
    """Tokens that train."""
    values_BTNM: Tensor
    """The critic's predictions at the states of the tokens (N = M = 0 without a critic)."""
    bootstrap_BNM: Tensor
    """The critic's predictions after the last token; 0 where the episode's end is worth 0."""
    zero_last_delta_B: Tensor
    """Sequences whose reward is missing and whose last temporal difference is therefore 0."""
    prompt_ids: tuple[str, ...]
    """Rows of one group share it."""
    rewarded_B: Tensor
    seed: int
    """Of this step, for rows that draw."""


@dataclass(frozen=True)
class Algorithm:
    """One row.

    Attributes:
        name: as in the config.
        paper: where it comes from.
        critic: `none`, `scalar` (N heads x 1), or `quantile` (N heads x M).
        estimate: (signals, config) -> (advantages_BT, targets_BTL), both detached, L = 0 without a critic.
        actor_loss: (logprobs_K, old_logprobs_K, advantages_K, config) -> (per-token loss, per-token clipped 0/1).
        critic_loss: (predictions_KNM, before_KNM, targets_KL, config) -> per-token terms; `loss` is minimised, all
            are logged. `before_KNM` are the predictions before the step's first update (for value clipping). None
            without a critic.
        defaults: nested config values that stand below the user's own.
    """

    name: str
    paper: str
    critic: Literal["none", "scalar", "quantile"]
    estimate: Callable[[Signals, "Config"], tuple[Tensor, Tensor]]
    actor_loss: Callable[[Tensor, Tensor, Tensor, "Config"], tuple[Tensor, Tensor]]
    critic_loss: Callable[[Tensor, Tensor, Tensor, "Config"], dict[str, Tensor]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.has_critic != (self.critic_loss is not None):
            raise InputError(f"algorithm = {self.name}: a row has a critic_loss if, and only if, it has a critic")

    @property
    def has_critic(self) -> bool:
        return self.critic != "none"

    @property
    def uses_critic_terms(self) -> bool:
        """Whether `critic.weights` mean anything to this row."""
        return self.critic == "quantile"


def find_algorithm(name: str) -> Algorithm:
    """The row of that name, or the object at `my_module:my_row`.

    Raises:
        InputError: no such row, module or attribute, or the object is no `Algorithm`.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean {near[0]}?" if near else "the rows are " + ", ".join(ALGORITHMS)
        raise InputError(f"algorithm = {name} is unknown: {hint} (your own: my_module:my_row)")
    module, _, attribute = name.partition(":")
    try:
        row = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module fails in whatever way it likes
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise InputError(f"algorithm = {name} cannot be imported ({reason}): check PYTHONPATH and the name") from error
    if not isinstance(row, Algorithm):
        raise InputError(f"algorithm = {name} is a {type(row).__name__}: it must be a dvpo.algorithms.Algorithm")
    return row


# Estimates


def scalar_estimate(signals: Signals, config: "Config") -> tuple[Tensor, Tensor]:
    """GAE on V = the mean over heads; the target is the lambda-return."""
    settings = config.advantage

    def at(lam: float) -> tuple[Tensor, Tensor]:
        return gae(
            signals.rewards_BT,
            signals.values_BTNM.mean(dim=(-2, -1)),
            signals.mask_BT,
            settings.gamma,
            lam,
            bootstrap=signals.bootstrap_BNM.mean(dim=(-2, -1)),
            zero_last_delta=signals.zero_last_delta_B,
        )

    advantages_BT, returns_BT = at(settings.lam)
    if critic_lam(settings) != settings.lam:
        returns_BT = at(critic_lam(settings))[1]
    return advantages_BT, returns_BT.unsqueeze(-1)


def distributional_estimate(signals: Signals, config: "Config") -> tuple[Tensor, Tensor]:
    """Distributional GAE on the ensemble's quantiles, sorted; the advantage is its mean over the quantiles."""
    settings = config.advantage
    quantiles_BTM = signals.values_BTNM.mean(dim=-2).sort(dim=-1).values
    bootstrap_BM = signals.bootstrap_BNM.mean(dim=-2).sort(dim=-1).values

    def at(lam: float) -> tuple[Tensor, Tensor]:
        return distributional_gae(
            signals.rewards_BT,
            quantiles_BTM,
            signals.mask_BT,
            settings.gamma,
            lam,
            bootstrap=bootstrap_BM,
            zero_last_delta=signals.zero_last_delta_B,
        )

    advantages_BTM, targets_BTM = at(settings.lam)
    if settings.target == "mixture":
        targets_BTM = mixture_targets(
            signals.rewards_BT,
            quantiles_BTM,
            signals.mask_BT,
            settings.gamma,
            critic_lam(settings),
            num_atoms=settings.target_atoms,
            seed=signals.seed,
            bootstrap=bootstrap_BM,
            zero_last_delta=signals.zero_last_delta_B,
        )
    elif critic_lam(settings) != settings.lam:
        targets_BTM = at(critic_lam(settings))[1]
    return advantages_BTM.mean(dim=-1), targets_BTM


def critic_lam(settings: "AdvantageConfig") -> float:
    """lambda of the critic's targets."""
    return settings.lam if settings.critic_lam is None else settings.critic_lam


# Losses


def ppo_actor_loss(
    logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor, config: "Config"
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate."""
    actor = config.actor
    return clipped_surrogate(logprobs_K, old_logprobs_K, advantages_K, actor.clip_low, actor.clip_high)


def squared_critic_loss(
    predictions_KNM: Tensor, before_KNM: Tensor, targets_KL: Tensor, config: "Config"
) -> dict[str, Tensor]:
    """Squared error with value clipping, mean over heads."""
    loss_KN = value_loss(
        predictions_KNM.squeeze(-1), before_KNM.squeeze(-1), targets_KL, value_clip=config.critic.value_clip
    )
    return {"loss": loss_KN.mean(dim=-1)}


def distributional_critic_loss(
    predictions_KNM: Tensor, before_KNM: Tensor, targets_KL: Tensor, config: "Config"
) -> dict[str, Tensor]:
    """Quantile regression and the asymmetric tail terms, L = QR + sum_x weight_x * x."""
    del before_KNM
    critic = config.critic
    levels_M = quantile_levels(critic.num_quantiles, critic.levels).to(predictions_KNM)
    terms = critic_terms(predictions_KNM, targets_KL, levels_M, critic.kappa, critic.eta, critic.alpha, critic.beta)
    weighted = [getattr(critic.weights, name) * term for name, term in terms.items() if name != "qr"]
    return {"loss": terms["qr"] + torch.stack(weighted).sum(dim=0), **terms}


ALGORITHMS: Mapping[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm(
            name="dvpo",
            paper="DVPO: Distributional Value Modeling-based Policy Optimization, arXiv 2512.03847",
            critic="quantile",
            estimate=distributional_estimate,
            actor_loss=ppo_actor_loss,
            critic_loss=distributional_critic_loss,
            defaults={
                "critic": {
                    "weights": dict.fromkeys(
                        ("risk", "cvar", "gain", "shift", "shape", "curvature", "consistency"), 0.1
                    )
                }
            },
        ),
        Algorithm(
            name="ppo",
            paper="Proximal Policy Optimization Algorithms, arXiv 1707.06347",
            critic="scalar",
            estimate=scalar_estimate,
            actor_loss=ppo_actor_loss,
            critic_loss=squared_critic_loss,
            defaults={"critic": {"num_heads": 1}},
        ),
    )
}
"""name -> row. A new baseline is one row here, one docs page, one test."""
