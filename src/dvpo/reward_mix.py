"""Several rewards added up: every part is guarded by itself, and a response that one has no opinion of has no reward.

    R = sum_i weight_i r_i

A part that is missing is not filled in. To share its weight among the others would pay for it what they pay: a response
of the right form whose correctness nobody could judge would get the reward of a right one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dvpo.core.masks import Reduce
from dvpo.metrics import Means
from dvpo.rewards import Fault, RewardSource, Scores
from dvpo.tasks import Reward, total


@dataclass(frozen=True)
class Part:
    """One of the rewards that are added up."""

    name: str
    """In the log, `reward/part/<name>`."""
    weight: float
    source: RewardSource | None
    """Whoever observes it; None: the task."""


class RewardMix:
    """Adds up what its parts observe, and keeps their figures until they are logged.

    Args:
        parts: in the order of the config.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._means = Means()

    def __call__(self, scores: Sequence[Scores]) -> Scores:
        """The mixed rewards of a batch.

        A number joins the last entry of another part's list. Lists of two lengths cannot be added: the response has no
        reward, which counts as a fault.

        Args:
            scores: of each part.

        Returns:
            A reward a sample, and the faults of all parts with the part's name before the message.
        """
        faults = [
            replace(fault, message=f"{part.name}: {fault.message}")
            for part, one in zip(self.parts, scores, strict=True)
            for fault in one.faults
        ]
        rewards: list[Reward] = []
        for index, values in enumerate(zip(*(one.rewards for one in scores), strict=True)):
            mixed = self._sum(values)
            if isinstance(mixed, str):
                faults.append(Fault("wrong_length", index, mixed))
            rewards.append(None if isinstance(mixed, str) else mixed)
        return Scores(rewards, faults)

    def observe(self, scores: Sequence[Scores]) -> None:
        """Keep the figures of a training step's responses."""
        for part, one in zip(self.parts, scores, strict=True):
            returns = torch.tensor([total(reward) for reward in one.rewards], dtype=torch.float64)
            key = f"reward/part/{part.name}"
            self._means.add(key, returns[returns.isfinite()])
            self._means.add(f"{key}/missing", (~returns.isfinite()).double())

    def figures(self, reduce: Reduce) -> dict[str, float]:
        """What has been observed since the last call: mean of each part before its weight, and missing share."""
        figures, self._means = self._means.result(reduce), Means()
        return figures

    def close(self) -> None:
        for part in self.parts:
            if part.source is not None:
                part.source.close()

    def _sum(self, values: Sequence[Reward]) -> Reward | str:
        """The weighted sum; None if a part is missing, a sentence if lists do not fit."""
        if any(math.isnan(total(value)) for value in values):
            return None
        lists = {part.name: value for part, value in zip(self.parts, values, strict=True) if isinstance(value, list)}
        lengths = {len(value) for value in lists.values()}
        if 0 in lengths:
            return "the parts " + " and ".join(n for n, v in lists.items() if not v) + " give an empty list"
        if len(lengths) > 1:
            return "the parts " + " and ".join(f"{n} ({len(v)})" for n, v in lists.items()) + " give unequal lists"
        mixed = [0.0] * max(lengths, default=1)
        for part, value in zip(self.parts, values, strict=True):
            entries = value if isinstance(value, list) else [*[0.0] * (len(mixed) - 1), value]
            mixed = [sum_ + part.weight * (entry or 0.0) for sum_, entry in zip(mixed, entries, strict=True)]
        return list(mixed) if lists else mixed[0]
