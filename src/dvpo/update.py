"""The update: what a step's rollout and estimates do to policy and critic, in epochs, minibatches and micro-batches.

Two modules, two optimisers, two clip norms: a critic's gradient never shrinks the policy's update. All denominators are
those of the optimiser step's whole batch, so nothing depends on the micro-batch, nor on how many processes share it.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from dvpo.algorithms import Algorithm
from dvpo.batch import Estimates, Rollout, cut
from dvpo.config import Config
from dvpo.core.losses import aggregation_weights, kl_estimate, truncated_ratio
from dvpo.core.masks import token_count
from dvpo.critic import Critic
from dvpo.critic_pass import CriticPass
from dvpo.distributed import agreed, all_reduce_sum, gather_objects, rank
from dvpo.kl import KLController
from dvpo.metrics import Means
from dvpo.noise_rates import KnownRates, RateEstimator
from dvpo.optimiser import Optimiser, learning_rate
from dvpo.parallel import idle_passes, inside
from dvpo.policy import Policy
from dvpo.risk_control import matched_to_noise
from dvpo.seeding import derive_seed
from dvpo.skips import Skips


class Learner:
    """The half of a `Trainer` that learns from a rollout; the trainer sets the attributes."""

    config: Config
    row: Algorithm
    device: torch.device
    step: int
    """The training step, from 1."""
    policy: Policy
    policy_optimiser: Optimiser
    policy_version: int
    """Optimiser steps of the policy so far."""
    critic: Critic | None
    critic_pass: CriticPass | None
    critic_optimiser: Optimiser | None
    rates: RateEstimator | KnownRates | None
    kl: KLController
    skips: Skips

    def update(self, rollout: Rollout, estimates: Estimates) -> dict[str, float]:
        """Some epochs over the rollout, each in `minibatches` optimiser steps; the critic may have more or fewer."""
        means = Means()
        warming_up = self.step <= self.config.update.actor_warmup_steps
        actor_epochs = 0 if warming_up else self.config.update.epochs
        critic_epochs = (self.config.critic.epochs or self.config.update.epochs) if self.critic else 0
        for epoch in range(max(actor_epochs, critic_epochs)):
            for rows in self._minibatches(rollout, "rows", self.step, epoch):
                if epoch < critic_epochs:
                    self._update_critic(rollout, estimates, rows, means)
                if epoch < actor_epochs:
                    self._update_actor(rollout, estimates, rows, means)
        figures = means.result(all_reduce_sum, agreed)
        if not warming_up:
            figures["actor/lr"] = learning_rate(self.config.policy_optimiser, self.step, self.config.steps)
        return figures

    def _minibatches(self, rollout: Rollout, *key: str | int) -> tuple[Tensor, ...]:
        """All rows of all processes, each in one of `minibatches` parts, in an order keyed by what it is for.

        Returns:
            Of each part the rows that are this process's.
        """
        sizes = gather_objects(len(rollout))
        first = sum(sizes[: rank()])
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, *key))
        order_B = torch.randperm(sum(sizes), generator=generator).to(self.device)
        parts = order_B.tensor_split(self.config.update.minibatches)
        return tuple(part[(part >= first) & (part < first + len(rollout))] - first for part in parts)

    def _update_critic(self, rollout: Rollout, estimates: Estimates, rows: Tensor, means: Means) -> None:
        assert self.critic is not None
        assert self.critic_pass is not None
        assert self.critic_optimiser is not None
        assert self.row.critic_loss is not None
        self.critic.learn_verdict_alone(self.step <= self.config.critic.verdict_only_steps)
        self.critic.draw_levels(self.config.seed, self.step)
        config = matched_to_noise(self.config, self.rates.rates()) if self.rates else self.config
        count = token_count(estimates.mask_BT[rows], all_reduce_sum)
        loss = torch.zeros((), device=self.device)
        for micro, at, mask_BT, share in self._microbatches(rollout, estimates, rows, self.critic):
            predictions_KNM = inside(self.critic, partial(self.critic_pass.predictions, at[0], micro, mask_BT))
            row_K, token_K = mask_BT.nonzero(as_tuple=True)  # one copy of what is large, where [at][mask_BT] makes two
            here = (at[0][row_K], token_K)
            before_BTNM = estimates.values_BTNM if self.row.critic == "scalar" else estimates.values_BTNM[..., :0, :0]
            terms = self.row.critic_loss(predictions_KNM, before_BTNM[here], estimates.targets_BTL[here], config)
            part = share * terms["loss"].sum() / count
            part.backward()
            loss += part.detach()
            for name, term_K in terms.items() if share else ():
                means.add(f"critic/{name}", term_K)
        moved = self._step(self.critic_optimiser, "critic", loss, means)
        self.skips.note("critic", moved, self.step, rollout, estimates, rows)

    def _update_actor(self, rollout: Rollout, estimates: Estimates, rows: Tensor, means: Means) -> None:
        actor, correction = self.config.actor, self.config.sampling.correction
        # Weights are made for the whole minibatch, then cut: the denominator must not know the micro-batch.
        weights_BT = torch.zeros_like(estimates.advantages_BT)
        weights_BT[rows], denominator = aggregation_weights(
            estimates.mask_BT[rows],
            actor.aggregation,
            self.config.sampling.max_completion_length,
            all_reduce_sum,
        )
        loss = torch.zeros((), device=self.device)
        every = means
        for micro, at, mask_BT, share in self._microbatches(rollout, estimates, rows, self.policy.model):
            means = every if share else Means()
            logprobs_K, entropies_K = self._logprobs(self.policy, micro, mask_BT, bool(actor.entropy_coef))
            old_K, sampled_K = micro.old_logprobs_BT[mask_BT], micro.sampler_logprobs_BT[mask_BT]
            loss_K, clipped_K = self.row.actor_loss(
                logprobs_K, old_K, estimates.advantages_BT[at][mask_BT], self.config
            )
            means.add("actor/loss", loss_K)
            if correction.kind == "truncated":
                counted_K, cut_K = truncated_ratio(old_K, sampled_K, correction.cap)
                loss_K = counted_K * loss_K
                means.add("actor/correction", counted_K)
                means.add("actor/correction_capped", cut_K)
            if actor.kl.coef:
                reference_K = estimates.reference_BT[at][mask_BT]
                penalty_K = kl_estimate(logprobs_K, reference_K, actor.kl.estimator)
                if actor.kl.place == "loss":
                    loss_K = loss_K + self.kl.coef * penalty_K
                means.add("actor/kl_reference", kl_estimate(logprobs_K.detach(), reference_K, "k3"))
            loss_K = loss_K - actor.entropy_coef * entropies_K
            part = share * (weights_BT[at][mask_BT] * loss_K).sum() / denominator
            part.backward()
            loss += part.detach()
            means.add("actor/clip_share", clipped_K)
            means.add("actor/entropy", entropies_K)
            means.add("actor/kl", kl_estimate(old_K, logprobs_K.detach(), "k3"))
            if self.policy_version == rollout.policy_version:
                # Before the first update trainer and sampler hold the same weights: any gap is the machinery's.
                means.add("actor/sampler_mismatch", (logprobs_K - sampled_K).abs())
                means.add("actor/sampler_kl", kl_estimate(sampled_K, logprobs_K.detach(), "k3"))
        moved = self._step(self.policy_optimiser, "actor", loss, every)
        self.skips.note("actor", moved, self.step, rollout, estimates, rows)
        self.policy_version += 1

    def _microbatches(
        self, rollout: Rollout, estimates: Estimates, rows: Tensor, module: nn.Module
    ) -> Iterator[tuple[Rollout, tuple[Tensor, slice], Tensor, float]]:
        """(rows without their common padding, where they stand in the full tensors, their training mask, 1).

        Where a sharded module must be run once more, because another process has more to do, it is some row and a 0:
        its loss is to be multiplied by that, and it is to count in no figure.
        """
        parts = [part for part in self._cut(rollout, rows) if estimates.mask_BT[part].any()]
        idle = idle_passes(len(parts), module)  # asked before the first pass: all processes are here together
        for part in parts:
            micro = rollout.select(part).trimmed()
            at = (part, slice(0, micro.mask_BT.shape[1]))
            yield micro, at, estimates.mask_BT[at], 1.0
        for _ in range(idle):
            part = torch.zeros(1, dtype=torch.long, device=self.device)
            micro = rollout.select(part).trimmed()
            yield micro, (part, slice(0, micro.mask_BT.shape[1])), micro.mask_BT, 0.0

    def _cut(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        update = self.config.update
        return cut(rollout, rows, update.microbatch_size, update.max_tokens_per_microbatch)

    def _logprobs(
        self, policy: Policy, micro: Rollout, mask_BT: Tensor, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        temperature = self.config.sampling.temperature
        return inside(policy.model, partial(policy.response_logprobs, micro, mask_BT, temperature, entropy))

    def _step(self, optimiser: Optimiser, name: str, loss: Tensor, means: Means) -> bool:
        norm, moved = optimiser.update(self.step, float(all_reduce_sum(loss)))
        if moved:
            means.add(f"{name}/grad_norm", torch.tensor(norm))
        means.add(f"{name}/skipped_updates", torch.tensor(float(not moved)))
        return moved

    @torch.no_grad()
    def _token_figures(self, policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the policy's tokens under any model, 0 elsewhere: both [B, T]."""
        figures = torch.zeros(2, *rollout.mask_BT.shape, device=self.device)
        every_B = torch.arange(len(rollout), device=self.device)
        parts = self._cut(rollout, every_B)
        for rows in [*parts, *[every_B[:1]] * idle_passes(len(parts), policy.model)]:
            micro = rollout.select(rows)
            part = torch.zeros(2, *micro.mask_BT.shape, device=self.device)
            part[:, micro.mask_BT] = torch.stack(self._logprobs(policy, micro, micro.mask_BT))
            figures[:, rows] = part
        return figures[0], figures[1]
