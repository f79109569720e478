"""Which prompts come next: passes over the training split, each in an order of its own."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from dvpo.errors import InputError
from dvpo.seeding import derive_seed
from dvpo.settings import TaskConfig
from dvpo.tasks import Example, Task
from dvpo.tasks.mixture import COLUMN, Mixture

FEW = 20
"""Below so many held-out prompts an accuracy's interval is wider than 40 points in the middle of its range."""


def warn_of_few(held_out: Sequence[Example], task: TaskConfig) -> None:
    """Of the user's own files: say that so few held-out prompts measure little, and which settings give more."""
    if task.name == "files" and 0 < len(held_out) < FEW:
        number = "1 prompt is" if len(held_out) == 1 else f"{len(held_out)} prompts are"
        more = f"task.id_path = {task.id_path}" if task.id_path else f"task.held_out = {task.held_out:g}"
        remedy = "add to that file" if task.id_path else "raise it, or name a file of them in task.id_path"
        warnings.warn(
            f"{more}: {number} held out, too few to measure by (below {FEW} an accuracy may be wrong by 20 points): "
            f"{remedy}",
            stacklevel=2,
        )


class PromptStream:
    """Draws prompts without replacement, pass after pass.

    The order of a pass is keyed by (seed, pass), so the whole state is one number: how many were drawn. `visit` is
    the pass, which is how often the prompt had been drawn before.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self.examples, self.seed, self.drawn = examples, seed, 0
        ids = [example.id for example in examples]
        if len(set(ids)) < len(ids):
            double = next(name for name, number in Counter(ids).items() if number > 1)
            raise InputError(f"task: the prompt id {double!r} stands twice in the training split: give each its own id")

    def next(self, count: int) -> list[tuple[Example, int]]:
        """The next prompts, each with its visit."""
        return [self._draw() for _ in range(count)]

    def _draw(self) -> tuple[Example, int]:
        visit, place = divmod(self.drawn, len(self.examples))
        if place == 0 or not hasattr(self, "_order"):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", visit))
            self._order = torch.randperm(len(self.examples), generator=generator).tolist()
        self.drawn += 1
        return self.examples[self._order[place]], visit

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "examples": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["examples"] != self._fingerprint:
            raise InputError(
                "resume: the training prompts are not those of the checkpoint: give the same data, or start another run"
            )
        self.drawn = state["drawn"]
        self.__dict__.pop("_order", None)

    @cached_property
    def _fingerprint(self) -> int:
        """Tells two training splits apart by their prompts' ids and order; asked for at every step."""
        return derive_seed(*(example.id for example in self.examples))


class MixedPrompts:
    """Draws the prompts of several tasks in the proportion of their weights, each task in the order of its own stream.

    The next prompt is one of the task that lags farthest behind its share of all draws, so every step is mixed. Which
    tasks come when follows from the weights alone: the whole state is one number here, too.
    """

    def __init__(self, examples: Sequence[Example], weights: Mapping[str, float], seed: int) -> None:
        self.drawn = 0
        self._shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self._streams = {
            name: PromptStream([e for e in examples if e.columns[COLUMN] == name], derive_seed(seed, "task", name))
            for name in weights
        }
        if empty := [name for name, stream in self._streams.items() if not stream.examples]:
            raise InputError(f"task.mix: no prompt of {empty[0]} fits sampling.max_prompt_length: raise it")

    def next(self, count: int) -> list[tuple[Example, int]]:
        """The next prompts, each with its visit."""
        return [prompt for _ in range(count) for prompt in self._streams[self._turn()].next(1)]

    def _turn(self) -> str:
        """The task whose turn it is."""
        self.drawn += 1
        return max(self._shares, key=lambda name: self._shares[name] * self.drawn - self._streams[name].drawn)

    def state_dict(self) -> dict[str, Any]:
        streams = {name: stream.state_dict()["examples"] for name, stream in self._streams.items()}
        return {"drawn": self.drawn, "examples": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = 0
        for name, stream in self._streams.items():
            stream.load_state_dict({"drawn": 0, "examples": state["examples"].get(name)})
        while self.drawn < state["drawn"]:
            self._streams[self._turn()].drawn += 1


def open_prompts(task: Task, examples: Sequence[Example], seed: int) -> PromptStream | MixedPrompts:
    """The prompts of a run: those of its task, or of the tasks that it mixes.

    Raises:
        InputError: an id that stands twice, or a task without any prompt.
    """
    return MixedPrompts(examples, task.weights, seed) if isinstance(task, Mixture) else PromptStream(examples, seed)
