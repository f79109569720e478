"""A conversation of your own to learn from: guess a number between two bounds, told `higher` or `lower`.

    python examples/own_environment.py                    # two steps, to see that it runs
    cd examples && dvpo train my.yaml task.name=own_environment:make_task

An environment is one episode: `reset` returns the prompt, `step` takes what the policy said and answers it. A task
hands out examples and makes an environment for each. The environment's words are masked, and its rewards land on the
last token that the policy wrote before them.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

from dvpo import Trainer, load_config
from dvpo.seeding import derive_seed
from dvpo.tasks import Environment, Example, Prompt, Reward, Step

GUESSES = 4  # enough for 15 numbers, if each guess halves what is left


class Guessing:
    """One episode."""

    def __init__(self, example: Example) -> None:
        self.example, self.number = example, example.columns["number"]

    def reset(self) -> Prompt:
        self.left = GUESSES
        return self.example.prompt

    def step(self, response: str) -> Step:
        self.left -= 1
        guess = int((re.findall("[0-9]{1,9}", response) or ["0"])[-1])
        if guess == self.number or self.left == 0:
            return Step(messages=(), reward=float(guess == self.number), done=True)
        hint = "higher" if guess < self.number else "lower"
        return Step(messages=[{"role": "user", "content": hint}], reward=None, done=False)


class GuessingTask:
    """Bounds below 60 are trained on; `id` has further numbers of theirs in store, `ood` larger bounds."""

    name = "guessing"

    def split(self, name: str) -> Sequence[Example]:
        lows = {"train": range(1, 60), "id": range(1, 60), "ood": range(60, 80)}.get(name, range(0))
        return [self.example(name, low) for low in lows]

    def example(self, split: str, low: int) -> Example:
        number = low + derive_seed(split, low) % 15
        prompt = [{"role": "user", "content": f"{low}..{low + 14}?"}]
        return Example(id=f"{split}-{low}", prompt=prompt, columns={"number": number})

    def environment(self, example: Example) -> Environment:
        return Guessing(example)

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        """What an episode earns on top of its steps: 0.0, not None: one that is cut short has failed, too."""
        return [0.0] * len(prompts)


def make_task(settings: Any) -> GuessingTask:
    """What `task.name: own_environment:make_task` calls, with the config's `task` section."""
    return GuessingTask()


def main(*overrides: str) -> None:
    tiny = ["steps=2", "sampling.prompts_per_step=2", "evaluation.prompts=4", "output=runs/guessing"]
    Trainer(load_config(None, [*tiny, *overrides]), task=GuessingTask()).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
