"""What travels through a training step, and the legend of the shape letters.

    B  sequences of the batch             N  critic heads
    T  positions of the padded response   M  quantiles of a head
    P  positions of the padded prompt     L  target atoms of a token
    S  P + T, the whole sequence          V  vocabulary
    D  hidden size                        K  policy tokens, flattened over B and T
    H  positions of the padded hint       U  T + 1, the states of a response, its end included
    R  bins of a categorical critic

A tensor's letters stand at the end of its name: `mask_BT` is [B, T].

Prompts are padded on the left and responses on the right, so response token t of every row sits in column P + t and
its *state* (prompt, y_<t) is read from the hidden state of column P + t - 1: the token before it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """Sampled and scored sequences: all that an algorithm may look at."""

    tokens_BS: Tensor
    """int64, prompt and response token ids; what stands at padded places means nothing."""
    attention_BS: Tensor
    """bool, True where there is a token (of anybody), False at padding."""
    mask_BT: Tensor
    """bool, True where the *policy* produced the token, the sampled end token included."""
    turns_BT: Tensor
    """int64, the policy's turn that a response token belongs to (0, 1, ...); -1 where mask_BT is False."""
    sampler_logprobs_BT: Tensor
    """float32, log-probability at sampling under the temperature-scaled, untruncated distribution; 0 where masked."""
    old_logprobs_BT: Tensor
    """float32, log-probability that the actor's ratio is against: with `sampling.correction` the trainer's own, under
    the weights that sampled; else the sampler's."""
    entropies_BT: Tensor
    """float32, entropy in nats of that distribution, 0 where masked; zeros unless `critic.features` asks for it."""
    hints_BH: Tensor
    """int64, tokens that a privileged critic reads before the prompt, -1 at padding in front; H = 0 without one."""
    terminated_B: Tensor
    """bool, the episode ended by itself (end token, stop string, environment)."""
    truncated_B: Tensor
    """bool, the length limit cut the episode; the opposite of terminated_B."""
    rewards_BT: Tensor
    """float32, observed reward at the token where it lands; 0 elsewhere, and where it is missing."""
    rewarded_B: Tensor
    """bool, False where supervision is missing (None, NaN, a failed reward call)."""
    observed_B: Tensor
    """float32, observed reward of the whole response; NaN where missing."""
    true_B: Tensor
    """float32, verified reward of the whole response; NaN where the truth is not known."""
    prompt_ids: tuple[str, ...]
    """Stable id of each row's prompt; rows of one group share it."""
    visits: tuple[int, ...]
    """How often that prompt had been drawn before."""
    samples: tuple[int, ...]
    """Index of the sample among those of its prompt in this step."""
    policy_version: int
    """Optimiser steps that the sampling policy had seen."""

    @property
    def prompt_length(self) -> int:
        """P, the padded prompt length."""
        return self.tokens_BS.shape[1] - self.mask_BT.shape[1]

    @property
    def response_BT(self) -> Tensor:
        """int64, the response's token ids."""
        return self.tokens_BS[:, self.prompt_length :]

    def __len__(self) -> int:
        return self.tokens_BS.shape[0]

    def to(self, device: torch.device) -> "Rollout":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def groups(self) -> Tensor:
        """int64 [B], equal for the responses to one prompt of this step."""
        keys = list(zip(self.prompt_ids, self.visits, strict=True))
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return torch.tensor([numbers[key] for key in keys], device=self.mask_BT.device)

    def select(self, rows: Tensor) -> "Rollout":
        """The given rows (int64 indices), in that order."""
        index = rows.tolist()

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[rows]
            return tuple(value[i] for i in index) if isinstance(value, tuple) else value

        return replace(self, **{f.name: pick(getattr(self, f.name)) for f in fields(self)})

    def trimmed(self) -> "Rollout":
        """The same rows without the columns that are padding in all of them: short rows need not pay for long ones."""
        used_S = self.attention_BS.any(dim=0).nonzero()
        first, last = int(used_S[0]), int(used_S[-1]) + 1
        first = min(first, self.prompt_length - 1)  # the state of the first response token needs one prompt column
        length = max(last - self.prompt_length, 1)

        def cut(name: str, value: Any) -> Any:
            if name.endswith("_BS"):
                return value[:, first : self.prompt_length + length]
            return value[:, :length] if name.endswith("_BT") else value

        return replace(self, **{f.name: cut(f.name, getattr(self, f.name)) for f in fields(self)})


def cut(rollout: Rollout, rows: Tensor, sequences: int, tokens: int = 0) -> list[Tensor]:
    """Rows in micro-batches, of at most so many sequences.

    With a bound on tokens those of like length go together, longest first, and each micro-batch has at most so many
    columns times rows once its common padding is gone; a sequence that is longer by itself stands alone.

    Args:
        rollout: whose rows they are.
        rows: int64.
        sequences: at most, of a micro-batch.
        tokens: at most, padding included; 0: no bound, and the rows stay in their order.
    """
    if not tokens:
        return [part for part in rows.split(sequences) if len(part)]
    prompt_length = rollout.prompt_length
    before = (rollout.attention_BS[:, :prompt_length].sum(dim=-1) + (rollout.hints_BH >= 0).sum(dim=-1)).tolist()
    after = rollout.attention_BS[:, prompt_length:].sum(dim=-1).tolist()
    parts: list[list[int]] = []
    widest = (0, 0)
    for row in sorted(rows.tolist(), key=lambda row: (before[row] + after[row], before[row], row), reverse=True):
        wider = (max(widest[0], before[row]), max(widest[1], after[row]))
        if parts and len(parts[-1]) < sequences and (len(parts[-1]) + 1) * sum(wider) <= tokens:
            parts[-1].append(row)
            widest = wider
        else:
            parts.append([row])
            widest = (before[row], after[row])
    return [torch.tensor(part, device=rows.device) for part in parts]


@dataclass(frozen=True)
class Estimates:
    """What an algorithm makes of a rollout, before any update; constant over the epochs of the step."""

    mask_BT: Tensor
    """bool, tokens that train: mask_BT of the rollout less the sequences that `mask` rules took out."""
    advantages_BT: Tensor
    """float32, the actor's weights; 0 where masked."""
    targets_BTL: Tensor
    """float32, the critic's target atoms; 0 where masked; L = 0 without a critic."""
    values_BTNM: Tensor
    """float32, the critic's predictions before the update, for value clipping; N = M = 0 without a critic."""
    reference_BT: Tensor
    """float32, log-probabilities under the reference policy; zeros when no KL term is asked for."""
