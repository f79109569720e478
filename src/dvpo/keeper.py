"""What of a run stays on the disk: its state between two steps, the best checkpoint and the last healthy one."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dvpo.checkpoint import Checkpointer, Writer, state_of
from dvpo.critic import Critic
from dvpo.distributed import on_main
from dvpo.durable import write_atomically
from dvpo.errors import InputError
from dvpo.lora import adapted_layers, adapter_writer
from dvpo.parallel import all_finite, whole
from dvpo.policy import Policy
from dvpo.settings_learning import CheckpointConfig
from dvpo.tasks import Task
from dvpo.tasks.mixture import held_out

BEST = "best.json"
JUDGES = "id/reward"
"""By this figure, of a mix of tasks by its mean over them, a checkpoint is the best: the mean true reward of greedy
answers to held-out prompts."""
STATE = ("evaluated", "best", "healthy", "last_healthy")


class Keeper:
    """Writes the checkpoints of a run, always of its last boundary: the state between two steps.

    Weights and optimisers change in a step's update only, and everything else that a step changes is small. So the
    boundary is a handful of numbers and references, and a run that is interrupted before the update goes back to it
    for free.

    Two checkpoints never make room for newer ones: the best by the held-out true reward, if that is asked for, and the
    last whose step had finite losses. (One with a weight that is not finite is not even written.)

    Args:
        folder: the run's.
        settings: the config's section.
        parts: name -> what has state; the keeper becomes one of them.
        policy: one of the two models.
        critic: the other; None for algorithms without one.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        parts: dict[str, Any],
        policy: Policy,
        critic: Critic | None,
    ) -> None:
        self.folder, self.settings, self.parts = folder, settings, parts
        self._weights: list[nn.Module] = [policy.model]
        self._writers: dict[str, Callable[[], Writer]] = {"policy": policy.writer}
        if adapted_layers(policy.model):
            self._writers["adapter"] = partial(adapter_writer, policy.model)
        if critic is not None:
            self._weights.append(critic)
            self._writers["critic"] = critic.writer
        self.evaluated = -1
        """Step of the last evaluation."""
        self.best: tuple[int, float] | None = None
        """Step and figure of the best evaluation, where one is to be kept."""
        self.healthy = True
        """Whether the losses of the last step were finite."""
        self.last_healthy: int | None = None
        """Step of the newest checkpoint whose step had finite losses."""
        self.on_disk = False
        """Whether a checkpoint holds the boundary."""
        self._boundary: dict[str, Any] = {}
        parts["keeper"] = self

    def mark(self, on_disk: bool = False) -> None:
        """The run stands between two steps; `on_disk`: as a checkpoint has it."""
        self._boundary, self.on_disk = state_of(self.parts), on_disk

    def evaluation_due(self, step: int, every: int, at_end: bool) -> bool:
        """Before the first step, every so many, and at the end; a resumed run may have made it already."""
        return self.evaluated != step and (step == 0 or at_end or _due(step, every))

    def checkpoint_due(self, step: int, at_end: bool) -> bool:
        """Every so many steps, at the end, and for a new best one."""
        is_best = self.best is not None and self.best[0] == step
        return not self.on_disk and (at_end or is_best or _due(step, self.settings.every))

    def judge_step(self, figures: Mapping[str, float]) -> None:
        """Take note of a step's losses."""
        self.healthy = all(math.isfinite(value) for name, value in figures.items() if name.endswith("/loss"))

    def judge_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Take note of an evaluation; of two that are equal the earlier stays the best."""
        self.evaluated = step
        judges = [value for name, value in figures.items() if name.endswith(f"/{JUDGES}")]
        value = sum(judges) / len(judges) if judges else math.nan
        if self.settings.keep_best and value > (self.best[1] if self.best else -math.inf):
            self.best = (step, value)

    def save(self) -> Path | None:
        """Write the boundary as `checkpoint-N`; None, and nothing is written, if a weight is NaN or infinite.

        Every process must come here: they gather what is sharded, and the main one writes it.
        """
        if not all_finite(self._weights):
            return None
        if self.healthy:
            self.last_healthy = self._boundary["trainer"]["step"]
        state = whole({**self._boundary, "keeper": self.state_dict()})
        writers = {name: writer() for name, writer in self._writers.items()}
        checkpoint = on_main(lambda: self._write(writers, state))
        self.on_disk = True
        return checkpoint

    def _write(self, writers: Mapping[str, Writer], state: Mapping[str, Any]) -> Path:
        spared = [kept for kept in (self.last_healthy, self.best and self.best[0]) if kept is not None]
        checkpointer = Checkpointer(self.folder, self.settings.keep)
        checkpoint = checkpointer.save(self._boundary["trainer"]["step"], writers, state, spared)
        if self.best:
            story = {"checkpoint": f"checkpoint-{self.best[0]}", JUDGES: self.best[1]}
            write_atomically(self.folder / BEST, [json.dumps(story).encode() + b"\n"])
        return checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])


def refuse_without_judge(settings: CheckpointConfig, task: Task) -> None:
    """Check that there is something to find the best checkpoint by.

    Raises:
        InputError: the task has no held-out split `id`.
    """
    if settings.keep_best and not any(split.endswith("id") for split in held_out(task)):
        raise InputError(
            f"checkpoint.keep_best = true judges by the held-out split id, which the task {task.name} lacks: "
            "give it one, or set keep_best to false"
        )


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0
