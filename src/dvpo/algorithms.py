"""The algorithms: one row each, composed of functions of `core`. No algorithm's name is tested anywhere else.

A row says which critic it wants, how advantages and critic targets are made from rewards and values, and what the
losses are. To bring your own, write an `Algorithm` and name it in the config: `algorithm: my_module:my_row`.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from dvpo.config import Config
from dvpo.core.categorical import histogram_centres, histogram_loss
from dvpo.core.losses import clipped_surrogate, huber_value_loss, value_loss
from dvpo.core.quantiles import quantile_levels
from dvpo.core.returns import group_mean_baseline, group_normalise, group_rank, leave_one_out
from dvpo.core.risk import critic_terms
from dvpo.core.tail_law import law_tail_terms
from dvpo.errors import InputError
from dvpo.estimates import (
    distributional_estimate,
    group_estimate,
    law_value,
    least_head_value,
    mean_target_estimate,
    mean_value,
    pessimistic_estimate,
    return_to_go_estimate,
    scalar_estimate,
)
from dvpo.settings_learning import AdvantageConfig
from dvpo.shaping import Signals


@dataclass(frozen=True)
class Algorithm:
    """One row.

    Attributes:
        name: as in the config.
        paper: where it comes from.
        critic: `none`, `scalar` (N heads x 1), `quantile` (N heads x M), `implicit` (the same at levels drawn anew for
            every update; predictions have the levels as one head more), `categorical` (a histogram, its values M atoms
            of equal mass; predictions are the logits of its bins), or `vocabulary` (Q of every token; the value is its
            expectation under the policy, and predictions are the pair Q(taken), logsumexp_a Q: N = 1, M = 2).
        estimate: (signals, config) -> (advantages_BT, targets_BTL), both detached, L = 0 without a critic.
        actor_loss: (logprobs_K, old_logprobs_K, advantages_K, config) -> (per-token loss, per-token clipped 0/1).
        critic_loss: (predictions_KNM, before_KNM, targets_KL, config) -> per-token terms; `loss` is minimised, all
            are logged. `before_KNM` are a scalar critic's predictions before the step's first update, for value
            clipping; of others they are not gathered: N = M = 0. None without a critic.
        defaults: nested config values that stand below the user's own.
        value: (values [..., N, M], settings of the advantage) -> [...], the number of the critic's that the actor's
            advantage is taken of; `advantage.recentre` goes by it.
        compares_group: whether its advantages are 0 where a prompt has a single response.
    """

    name: str
    paper: str
    critic: Literal["none", "scalar", "quantile", "implicit", "categorical", "vocabulary"]
    estimate: Callable[[Signals, Config], tuple[Tensor, Tensor]]
    actor_loss: Callable[[Tensor, Tensor, Tensor, Config], tuple[Tensor, Tensor]]
    critic_loss: Callable[[Tensor, Tensor, Tensor, Config], dict[str, Tensor]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    value: Callable[[Tensor, AdvantageConfig], Tensor] = mean_value
    compares_group: bool = False

    def __post_init__(self) -> None:
        if self.has_critic != (self.critic_loss is not None):
            raise InputError(f"algorithm = {self.name}: a row has a critic_loss if, and only if, it has a critic")

    @property
    def has_critic(self) -> bool:
        return self.critic != "none"

    @property
    def uses_critic_terms(self) -> bool:
        """Whether `critic.weights` mean anything to this row."""
        return self.critic in ("quantile", "implicit")

    @property
    def has_law(self) -> bool:
        """Whether its critic's values are atoms of a law, of which `advantage.law` makes a number."""
        return self.uses_critic_terms or self.critic == "categorical"


def find_algorithm(name: str) -> Algorithm:
    """The row of that name, or the object at `my_module:my_row`.

    Raises:
        InputError: no such row, module or attribute, or the object is no `Algorithm`.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name.lower(), ALGORITHMS, n=1)
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


# Losses


def ppo_actor_loss(
    logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate."""
    actor = config.actor
    return clipped_surrogate(logprobs_K, old_logprobs_K, advantages_K, actor.clip_low, actor.clip_high)


def squared_critic_loss(
    predictions_KNM: Tensor, before_KNM: Tensor, targets_KL: Tensor, config: Config
) -> dict[str, Tensor]:
    """Squared error with value clipping, mean over heads."""
    loss_KN = value_loss(
        predictions_KNM.squeeze(-1), before_KNM.squeeze(-1), targets_KL, value_clip=config.critic.value_clip
    )
    return {"loss": loss_KN.mean(dim=-1)}


def huber_critic_loss(
    predictions_KNM: Tensor, before_KNM: Tensor, targets_KL: Tensor, config: Config
) -> dict[str, Tensor]:
    """Huber loss of width kappa, mean over heads: the scalar critic that outliers in the reward cannot drag."""
    del before_KNM
    predictions_KN = predictions_KNM.squeeze(-1)
    loss_KN = huber_value_loss(predictions_KN, targets_KL.expand_as(predictions_KN), config.critic.kappa)
    return {"loss": loss_KN.mean(dim=-1)}


def conservative_critic_loss(
    predictions_KNM: Tensor, before_KNM: Tensor, targets_KL: Tensor, config: Config
) -> dict[str, Tensor]:
    """Squared error of Q(taken), and what the tokens not taken are worth above it: logsumexp_a Q - Q(taken)."""
    del before_KNM
    taken_K, soft_maximum_K = predictions_KNM.squeeze(-2).unbind(dim=-1)
    regression_K = value_loss(taken_K, taken_K, targets_KL.squeeze(-1), value_clip=None)
    conservative_K = soft_maximum_K - taken_K
    return {"loss": regression_K + config.critic.cql_weight * conservative_K, "conservative": conservative_K}


def distributional_critic_loss(
    predictions_KNM: Tensor, before_KNM: Tensor, targets_KL: Tensor, config: Config
) -> dict[str, Tensor]:
    """Quantile regression and the asymmetric tail terms, L = QR + sum_x weight_x * x."""
    del before_KNM
    levels_M = quantile_levels(config.critic.num_quantiles, config.critic.levels).to(predictions_KNM)
    return _quantile_terms(predictions_KNM, targets_KL, levels_M, config)


def implicit_critic_loss(
    predictions_KNM: Tensor, before_KNM: Tensor, targets_KL: Tensor, config: Config
) -> dict[str, Tensor]:
    """The same at the levels that were drawn, which come as the last head."""
    del before_KNM
    return _quantile_terms(predictions_KNM[:, :-1], targets_KL, predictions_KNM[0, -1], config)


def _quantile_terms(predictions_KNM: Tensor, targets_KL: Tensor, levels_M: Tensor, config: Config) -> dict[str, Tensor]:
    critic = config.critic
    terms = critic_terms(predictions_KNM, targets_KL, levels_M, critic.kappa, critic.eta, critic.alpha, critic.beta)
    if critic.tail_targets == "law":
        terms |= law_tail_terms(predictions_KNM, targets_KL, critic.alpha, critic.beta)
    loss_K = terms["qr"]
    for name in TERMS:
        # All terms are logged; one of weight 0 stays out of the graph, so that its gradient is not worked out.
        if (weight := getattr(critic.weights, name)) != 0:
            loss_K = loss_K + weight * terms[name]
    return {"loss": loss_K, **terms}


def histogram_critic_loss(
    predictions_KNM: Tensor, before_KNM: Tensor, targets_KL: Tensor, config: Config
) -> dict[str, Tensor]:
    """Cross-entropy of the bins' logits (in place of M) to the smoothed target, which is clipped to the support."""
    del before_KNM
    support = config.critic.histogram
    centres_R = histogram_centres(support.bins, support.low, support.high, support.sigma).to(predictions_KNM)
    inside_KL = targets_KL.clamp(support.low, support.high)
    loss_K = histogram_loss(predictions_KNM, inside_KL, centres_R, support.sigma)
    return {"loss": loss_K, "outside": (inside_KL != targets_KL).float().mean(dim=-1)}


# Rows. Those of one family differ in a few settings, which is what `replace` says.

TERMS = ("consistency", "risk", "cvar", "gain", "shift", "shape", "curvature")


def _weights(*terms: str) -> dict[str, Any]:
    """The paper's weight .1 for the named terms, 0 for the others; stated in full, so that a row stays what it is."""
    return {"critic": {"weights": {term: 0.1 if term in terms else 0.0 for term in TERMS}}}


_PAPER: dict[str, Any] = {
    "critic": {
        "trunk": "own",
        "num_heads": 3,
        "monotone": True,
        "levels": "midpoint",
        "kappa": 0.1,
        "eta": 2.0,
        "alpha": 0.1,
        "beta": 0.1,
        "tail_targets": "sample",
        "adaptive_risk": False,
        **_weights(*TERMS)["critic"],
    },
    "advantage": {
        "gamma": 1.0,
        "lam": 0.95,
        "critic_lam": None,
        "target": "indexwise",
        "delta_clip": None,
        "whiten": True,
        "law": {"functional": "mean"},
    },
    "actor": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean"},
}
"""The paper's terms and constants, whatever `dvpo` becomes; M goes with the model (200 in the paper)."""

_DVPO_PLAIN = Algorithm(
    name="dvpo_plain",
    paper="arXiv 2512.03847, first rung of its ablation: quantile regression alone",
    critic="quantile",
    estimate=distributional_estimate,
    value=law_value,
    critic_loss=distributional_critic_loss,
    actor_loss=ppo_actor_loss,
    defaults=_weights(),
)
_PPO = Algorithm(
    name="ppo",
    paper="Proximal Policy Optimization Algorithms, arXiv 1707.06347",
    critic="scalar",
    estimate=scalar_estimate,
    critic_loss=squared_critic_loss,
    actor_loss=ppo_actor_loss,
    defaults={"critic": {"num_heads": 1}},
)
_GRPO = Algorithm(
    name="grpo",
    paper="DeepSeekMath, arXiv 2402.03300",
    critic="none",
    estimate=group_estimate(group_normalise),
    actor_loss=ppo_actor_loss,
    defaults={"advantage": {"whiten": False}, "actor": {"aggregation": "seq_mean_token_mean"}},
    compares_group=True,
)

_RANK: dict[str, Any] = {**_weights(), "advantage": {"law": {"functional": "rank"}}}
"""The law is compared with the target's in the advantage; no term of the critic's loss but quantile regression."""

_CORRECTED: dict[str, Any] = {"reward": {"trusted": 0.05, "correction": "backward"}}
"""Rewards corrected by rates that are estimated on a share of the prompts."""

ROWS = (
    replace(
        _DVPO_PLAIN,
        name="dvpo",
        paper="DVPO: Distributional Value Modeling-based Policy Optimization, arXiv 2512.03847, with rank advantages",
        defaults=_RANK,
    ),
    _PPO,
    replace(_DVPO_PLAIN, name="dvpo_paper", paper="arXiv 2512.03847, frozen; last rung", defaults=_PAPER),
    _DVPO_PLAIN,
    replace(
        _DVPO_PLAIN,
        name="dvpo_cons",
        paper="arXiv 2512.03847, ablation: + consistency of the heads",
        defaults=_weights("consistency"),
    ),
    replace(
        _DVPO_PLAIN,
        name="dvpo_cons_tail",
        paper="arXiv 2512.03847, ablation: + risk weights and tail means",
        defaults=_weights("consistency", "risk", "cvar", "gain"),
    ),
    replace(
        _DVPO_PLAIN,
        name="dvpo_cons_tail_shift",
        paper="arXiv 2512.03847, ablation: + shift",
        defaults=_weights("consistency", "risk", "cvar", "gain", "shift"),
    ),
    replace(
        _DVPO_PLAIN,
        name="dvpo_rank",
        paper="ours: docs/method.md, section 6c; what dvpo is, whatever it becomes",
        defaults=_RANK,
    ),
    replace(
        _DVPO_PLAIN,
        name="rfqi_ppo",
        paper="inspired by RFQI, Panaganti et al. 2022, arXiv 2208.05767; static here",
        defaults={**_weights(), "advantage": {"law": {"functional": "tv_worst_case"}}},
    ),
    replace(
        _DVPO_PLAIN,
        name="dvpo_iqn",
        paper="implicit quantile networks, Dabney et al. 2018, arXiv 1806.06923",
        critic="implicit",
        critic_loss=implicit_critic_loss,
    ),
    replace(
        _PPO, name="ppo_ensemble", paper="ours: what an ensemble alone gives", defaults={"critic": {"num_heads": 3}}
    ),
    replace(
        _PPO,
        name="robust_ppo",
        paper="robust Bellman PPO, as compared in arXiv 2512.03847",
        estimate=pessimistic_estimate,
        value=least_head_value,
        defaults={"critic": {"num_heads": 3}},
    ),
    replace(_PPO, name="ppo_huber", paper="control: a scalar Huber critic", critic_loss=huber_critic_loss),
    replace(
        _PPO,
        name="ppo_delta_clip",
        paper="control: every delta clipped, a scalar Huber critic",
        critic_loss=huber_critic_loss,
        defaults={"critic": {"num_heads": 1}, "advantage": {"delta_clip": 1.0}},
    ),
    replace(
        _PPO,
        name="ppo_reward_clip",
        paper="control: the reward clipped",
        defaults={"critic": {"num_heads": 1}, "reward": {"clip": 1.0}},
    ),
    replace(
        _PPO,
        name="ppo_corrected",
        paper="Natarajan et al. 2013; Imperfect Verifiers, arXiv 2510.00915; the rates estimated",
        defaults={"critic": {"num_heads": 1}, **_CORRECTED},
    ),
    replace(
        _PPO,
        name="ppo_hl_gauss",
        paper="Stop Regressing, Farebrother et al. 2024, arXiv 2403.03950",
        critic="categorical",
        estimate=mean_target_estimate,
        value=law_value,
        critic_loss=histogram_critic_loss,
    ),
    replace(
        _PPO,
        name="cql_ppo",
        paper="CQL, Kumar et al. 2020, arXiv 2006.04779; of tokens as in ILQL, Snell et al. 2022, arXiv 2206.11871",
        critic="vocabulary",
        critic_loss=conservative_critic_loss,
    ),
    _GRPO,
    replace(
        _GRPO,
        name="grpo_corrected",
        paper="Imperfect Verifiers, arXiv 2510.00915; the rates estimated",
        # Divided by the group's deviation, a corrected reward would be what it was before the correction.
        estimate=group_estimate(group_mean_baseline),
        defaults={**_GRPO.defaults, **_CORRECTED},
    ),
    replace(
        _GRPO,
        name="grpo_rank",
        paper="control: ranks inside the group",
        estimate=group_estimate(group_rank),
    ),
    replace(
        _GRPO,
        name="dr_grpo",
        paper="Understanding R1-Zero-Like Training, arXiv 2503.20783",
        estimate=group_estimate(group_mean_baseline),
        defaults={"advantage": {"whiten": False}, "actor": {"aggregation": "seq_sum_fixed_length"}},
    ),
    replace(
        _GRPO,
        name="rloo",
        paper="Back to Basics, arXiv 2402.14740",
        estimate=group_estimate(leave_one_out),
        defaults={"advantage": {"whiten": False}},
    ),
    replace(
        _GRPO,
        name="reinforce_pp",
        paper="REINFORCE++, arXiv 2501.03262",
        estimate=return_to_go_estimate,
        compares_group=False,
        defaults={"actor": {"kl": {"place": "reward"}}},
    ),
)

ALGORITHMS: Mapping[str, Algorithm] = {row.name: row for row in ROWS}
"""name -> row. A new baseline is one row here, one docs page, one test."""
