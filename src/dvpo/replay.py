"""The last steps' responses, kept for the critic: it sees each of them again, the policy does not."""

from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

from dvpo.batch import Rollout


class Replay:
    """The rollouts of the last `capacity` steps, oldest first, on the CPU.

    Rewards and masks stay what they were. Values and targets are not kept: they are made anew by the critic of the
    day, or its own early mistakes would come back to it as the truth.
    """

    def __init__(self, capacity: int) -> None:
        self._rollouts: deque[Rollout] = deque(maxlen=capacity)

    def add(self, rollout: Rollout) -> None:
        self._rollouts.append(rollout.to(torch.device("cpu")))

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self._rollouts)

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": [{f.name: getattr(rollout, f.name) for f in fields(rollout)} for rollout in self]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rollouts.clear()
        self._rollouts.extend(Rollout(**values) for values in state["rollouts"])
