"""Six responses as an estimate sees them, the estimate of a row, shaped rewards; when turns are the same."""

import dataclasses

import pytest
import torch
from torch import Tensor

from dvpo.algorithms import ALGORITHMS
from dvpo.core.masks import identity
from dvpo.loading import load_config
from dvpo.sampling import Turn
from dvpo.settings import RewardConfig
from dvpo.shaping import NO_RATES, Rates, Signals, last_token, reward_trust, shape_rewards

NOISE = Rates(false_positive=0.1, false_negative=0.3)


def signals(num_heads: int = 3, num_quantiles: int = 5) -> Signals:
    """Two prompts of three responses; a gap in the second response, no reward for the last."""
    draw = torch.Generator().manual_seed(11)
    mask_BT = torch.tensor(
        [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool
    )
    rewarded_B = torch.tensor([True, True, True, True, True, False])
    rewards_BT = last_token(mask_BT) * torch.tensor([1.0, 0, 0, 2, 1, 0]).unsqueeze(-1)
    return Signals(
        rewards_BT=rewards_BT,
        mask_BT=mask_BT & rewarded_B.unsqueeze(-1),
        values_BTNM=torch.rand(6, 4, num_heads, num_quantiles, generator=draw),
        bootstrap_BNM=torch.zeros(6, num_heads, num_quantiles),
        zero_last_delta_B=~rewarded_B,
        groups_B=torch.tensor([0, 0, 0, 1, 1, 1]),
        rewarded_B=rewarded_B,
        seed=0,
    )


def estimate(name: str, given: Signals, *overrides: str) -> tuple[Tensor, Tensor]:
    config = load_config({"algorithm": name}, overrides)
    trusting = dataclasses.replace(given, reward_trust=reward_trust(config.advantage, step=1))
    return ALGORITHMS[name].estimate(trusting, config)


def shape(norm: str, clip: float | None = None, correction: str = "none", rates: Rates = NO_RATES) -> Tensor:
    given = signals()
    settings = RewardConfig(norm=norm, clip=clip, correction=correction)  # type: ignore[arg-type]
    return shape_rewards(given.rewards_BT, given.mask_BT, given.groups_B, given.rewarded_B, settings, identity, rates)


def assert_same(turns: list[Turn], others: list[Turn]) -> None:
    for turn, other in zip(turns, others, strict=True):
        assert (turn.tokens, turn.finished) == (other.tokens, other.finished)
        assert turn.logprobs == pytest.approx(other.logprobs, abs=1e-5)
