"""The critic's forward passes over a rollout; the one before the update serves the update's beginning as well."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dvpo.batch import Rollout, cut
from dvpo.config import Config
from dvpo.core.masks import rows_where
from dvpo.critic import Critic
from dvpo.parallel import idle_passes, inside, is_sharded
from dvpo.policy import Policy


class _Kept(NamedTuple):
    rows: Tensor
    states_BUD: Tensor
    values_BUNM: Tensor
    version: int
    """Of the critic's weights."""


class CriticPass:
    """Values of a whole rollout without a gradient, predictions for a micro-batch with one.

    Between the estimate and the critic's first micro-batch no weight moves. That micro-batch goes through trunk and
    heads once: its values keep their graph, the memory of one micro-batch, until the update takes them. (Not where the
    critic is sharded: a graph holds on to gathered weights.)

    Args:
        critic: whose passes they are.
        policy: what a trunkless critic reads, and whose next token a vocabulary critic expects.
        config: says how many sequences go through at once, and the temperature of sampling.
    """

    def __init__(self, critic: Critic, policy: Policy, config: Config) -> None:
        self.critic, self.policy = critic, policy
        self.update, self.temperature = config.update, config.sampling.temperature
        self._expected: Tensor | None = None
        self._kept: _Kept | None = None

    def expect(self, microbatch: Tensor) -> None:
        """Announce the rows that the critic learns from first, of the rollout that `values` is asked for next."""
        self._expected = None if is_sharded(self.critic) else microbatch

    @torch.no_grad()
    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Predictions at every token's state, and at the state after the last token: [B, T, N, M], [B, N, M]."""
        every_B = torch.arange(len(rollout), device=rollout.mask_BT.device)
        first_B = every_B[:0] if self._expected is None else self._expected
        # Rows are numbers within one rollout: what was kept of another is nothing to this one.
        self._expected = self._kept = None
        rest_B = every_B[torch.isin(every_B, first_B, invert=True)]
        rest = cut(rollout, rest_B, self.update.microbatch_size, self.update.max_tokens_per_microbatch)
        parts = [part for part in (first_B, *rest) if len(part)]
        last_B = rollout.attention_BS[:, rollout.prompt_length :].sum(dim=-1)
        # Written where they are to stand: copies of what is large cost more than the heads' own arithmetic.
        of_state = (self.critic.shape.num_heads, self.critic.shape.num_quantiles)
        values_BTNM = rollout.rewards_BT.new_empty(*rollout.mask_BT.shape, *of_state)
        bootstrap_BNM = rollout.rewards_BT.new_empty(len(rollout), *of_state)
        for place, rows in enumerate([*parts, *[every_B[:1]] * idle_passes(len(parts), self.critic)]):
            micro = rollout.select(rows).trimmed()
            piece_BUNM = inside(self.critic, partial(self._values, rows, micro, keep=rows is first_B))
            if place < len(parts):
                width = micro.mask_BT.shape[1]
                values_BTNM[rows, :width], values_BTNM[rows, width:] = piece_BUNM[:, :-1], 0.0
                bootstrap_BNM[rows] = piece_BUNM[torch.arange(len(rows), device=rows.device), last_B[rows]]
        return values_BTNM, bootstrap_BNM

    def _values(self, rows: Tensor, micro: Rollout, keep: bool) -> Tensor:
        with torch.set_grad_enabled(keep):
            states_BUD = self.critic.states(micro, self.policy)
        with torch.set_grad_enabled(keep and self.critic.predicts_values):
            values_BUNM = self.critic.values(states_BUD, micro, self.policy, self.temperature)
        if keep:
            self._kept = _Kept(rows, states_BUD, values_BUNM, self._version())
        return values_BUNM.detach()

    def predictions(self, rows: Tensor, micro: Rollout, mask_BT: Tensor) -> Tensor:
        """What the critic's loss is about at these tokens of these rows of the rollout, trimmed: [K, N, M].

        What was kept is handed out once.
        """
        kept, self._kept = self._kept, None
        before_BU = F.pad(mask_BT, (0, 1))  # the states before these tokens; none is before the end
        if kept is None or kept.version != self._version() or not torch.equal(kept.rows, rows):
            states_BUD = self.critic.states(micro, self.policy)
        elif self.critic.predicts_values:
            return rows_where(kept.values_BUNM, before_BU)
        else:
            states_BUD = kept.states_BUD
        return self.critic.predictions(rows_where(states_BUD, before_BU), micro.response_BT[mask_BT])

    def _version(self) -> int:
        """Grows with every change of a weight."""
        return sum(parameter._version for parameter in self.critic.parameters())
