"""What the critic learns inside verl, as functions of flat tensors: verl itself is not imported here."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dvpo.algorithms import Algorithm, find_algorithm
from dvpo.config import Config
from dvpo.core.risk import spectral_value
from dvpo.critic import CriticShape
from dvpo.errors import InputError
from dvpo.estimates import law_weights
from dvpo.loading import load_config
from dvpo.seeding import derive_seed
from dvpo.settings_learning import CriticLoraConfig
from dvpo.shaping import Signals

SECTIONS = ("algorithm", "seed", "critic", "advantage")
"""What of dvpo's config means something inside verl; the rest of it is verl's own."""


@dataclass(frozen=True)
class Objective:
    """A row's value, targets and critic loss, for tokens laid end to end: K of them, without padding.

    Args:
        config: dvpo's; of a row with a critic of quantiles.
    """

    config: Config

    @property
    def row(self) -> Algorithm:
        return find_algorithm(self.config.algorithm)

    def values(self, theta_KNM: Tensor) -> Tensor:
        """The number that verl's GAE takes for the law of each state: the ensemble under `advantage.law`, [K]."""
        weights_M = law_weights(self.config.advantage.law, theta_KNM.shape[-1])
        with exact(theta_KNM):
            return spectral_value(theta_KNM.mean(dim=-2), weights_M)

    def targets(self, rewards_T: Tensor, ensemble_TM: Tensor, mask_T: Tensor, tokens_T: Tensor) -> Tensor:
        """The critic's target atoms at the policy's tokens of one response: [K, L].

        Args:
            rewards_T: rewards, less a KL penalty where verl takes it from them; 0 at tokens that are not the policy's.
            ensemble_TM: what the critic thought before the update, mean over heads; anything where the mask is 0.
            mask_T: 1 at the policy's tokens.
            tokens_T: the response, which keys the draws of `advantage.target = mixture`.
        """
        mask_T = mask_T.bool()
        if not mask_T.any():
            mixture = self.config.advantage.target == "mixture"
            return ensemble_TM.new_empty(0, self.config.advantage.target_atoms if mixture else ensemble_TM.shape[-1])
        key = hashlib.sha256(tokens_T.cpu().numpy().tobytes()).hexdigest()
        one = torch.ones(1, dtype=torch.bool, device=mask_T.device)
        signals = Signals(
            rewards_BT=(rewards_T.float() * mask_T)[None],
            mask_BT=mask_T[None],
            values_BTNM=ensemble_TM[None, :, None],
            bootstrap_BNM=ensemble_TM.new_zeros(1, 1, ensemble_TM.shape[-1]),
            zero_last_delta_B=~one,
            groups_B=one.long(),
            rewarded_B=one,
            seed=derive_seed(self.config.seed, "targets", key),
        )
        _, targets_BTL = self.row.estimate(signals, self.config)
        return targets_BTL[0][mask_T]

    def loss(self, predictions_KNM: Tensor, targets_KL: Tensor) -> dict[str, Tensor]:
        """The row's terms a token; `loss` is minimised."""
        assert self.row.critic_loss is not None
        before_KNM = predictions_KNM.detach()  # for value clipping, which quantiles do without
        with exact(predictions_KNM):
            return self.row.critic_loss(predictions_KNM, before_KNM, targets_KL, self.config)

    def check_shape(self, shape: CriticShape, folder: str) -> None:
        """Hold the prepared critic against the config.

        Raises:
            InputError: it has another number of heads or quantiles, other levels, or no trunk of its own.
        """
        for name in ("num_heads", "num_quantiles", "levels", "monotone"):
            asked, found = getattr(self.config.critic, name), getattr(shape, name)
            if asked != found:
                raise InputError(
                    f"dvpo.critic.{name} = {asked}, but the critic in {folder} was prepared with {found}: "
                    "change the setting, or prepare the critic anew"
                )
        if (shape.kind, shape.trunk, shape.features) != ("quantile", "own", False):
            raise InputError(
                f"critic.model.path = {folder} holds a {shape.kind} critic with trunk = {shape.trunk} and features = "
                f"{shape.features}: verl trains quantile critics with a trunk of their own and without features"
            )


def make_objective(settings: Mapping[str, Any], gamma: float, lam: float) -> Objective:
    """The `dvpo` section of a verl config as an objective.

    Args:
        settings: plain values, the sections named in `SECTIONS`.
        gamma: of verl's `algorithm` section, which the actor's GAE uses.
        lam: likewise.

    Raises:
        InputError: unknown keys, values out of range, or settings that mean nothing inside verl.
    """
    if foreign := set(settings) - set(SECTIONS):
        raise InputError(
            f"dvpo.{min(foreign)} means nothing inside verl: take {', '.join(SECTIONS)}, and set the rest in verl's own"
        )
    of_verl = {"gamma": gamma, "lam": lam, **settings.get("advantage", {})}
    config = load_config({"algorithm": "dvpo_paper", **settings, "advantage": of_verl})
    row, advantage, critic = find_algorithm(config.algorithm), config.advantage, config.critic
    if row.critic != "quantile":
        raise InputError(
            f"dvpo.algorithm = {config.algorithm} has a {row.critic} critic: inside verl take a row with quantiles, "
            "such as dvpo_paper; ppo and grpo are verl's own"
        )
    if (advantage.gamma, advantage.lam) != (gamma, lam):
        raise InputError(
            f"dvpo.advantage.gamma, lam = {advantage.gamma}, {advantage.lam} differ from algorithm.gamma, lam = "
            f"{gamma}, {lam}, which the actor uses: set the latter, and dvpo.advantage.critic_lam for the targets"
        )
    followed = {
        "advantage.law.functional": advantage.law.functional not in ("rank", "denoised"),
        "advantage.delta_clip": advantage.delta_clip is None,
        "advantage.whiten": advantage.whiten,
        "advantage.truncation": advantage.truncation == "terminal",
        "advantage.missing_reward": advantage.missing_reward == "mask",
        "advantage.recentre": not advantage.recentre,
        "advantage.reward_trust": advantage.reward_trust == 1,
        "advantage.doubt_steps": advantage.doubt_steps is None,
        "critic.trunk": critic.trunk == "own",
        "critic.features": not critic.features,
        "critic.privileged": critic.privileged is None,
        "critic.adaptive_risk": not critic.adaptive_risk,
        "critic.replay": not critic.replay,
        "critic.verdict_only_steps": not critic.verdict_only_steps,
        "critic.epochs": critic.epochs is None,
        "critic.lora": critic.lora == CriticLoraConfig(),
    }
    if refused := [name for name, known in followed.items() if not known]:
        value: Any = functools.reduce(getattr, refused[0].split("."), config)
        raise InputError(
            f"dvpo.{refused[0]} = {value} cannot be followed inside verl, where GAE, epochs and inputs are verl's: "
            f"{'take dvpo_paper' if value == 'rank' else 'leave it out'}, or train with `dvpo train`"
        )
    return Objective(config)


def exact(tensor: Tensor) -> AbstractContextManager[Any]:
    """float32 where verl, which calls from within its autocast, would have products in bf16."""
    return torch.autocast(tensor.device.type, enabled=False)


def state_places(lengths: Tensor, responses: Tensor, stride: int | None) -> Tensor:
    """Where the states of the response tokens stand among the trunk's flattened outputs: each before its token.

    Args:
        lengths: [B], tokens of prompt and response together.
        responses: [B], tokens of the response.
        stride: columns of a row where rows are padded on the right; None where they lie end to end.

    Returns:
        int64 [sum of responses].
    """
    rows = torch.arange(len(lengths), device=lengths.device)
    starts = rows * stride if stride is not None else lengths.cumsum(0) - lengths
    first = starts + lengths - responses - 1
    shift = first - (responses.cumsum(0) - responses)
    return shift.repeat_interleave(responses) + torch.arange(int(responses.sum()), device=lengths.device)


def same_rows(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two batches hold the same token sequences in the same order."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
