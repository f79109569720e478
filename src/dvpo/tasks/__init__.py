"""What a task is: examples to learn from and to be judged by, an environment to talk to, the truth if it is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

Message = Mapping[str, str]
"""One chat message: `{"role": "user" | "assistant" | "system" | "tool", "content": "..."}`."""

Prompt = str | Sequence[Message]
"""A plain string is continued as it stands; a message list goes through the tokenizer's chat template."""

Reward = float | None | list[float | None]
"""A scalar for the whole response; None or NaN for "no opinion"; or one entry a turn, or one a token."""


def total(reward: Reward) -> float:
    """The return of a whole response; NaN where an entry is missing."""
    values = reward if isinstance(reward, list) else [reward]
    return sum(nan if v is None else v for v in values)


Completion = str | Sequence[Message]
"""What the policy wrote: a text, or a conversation's messages behind the prompt, those of the environment included."""

OodKind = Literal["unseen", "untrained"]
"""What an embedded task's `ood` holds: what its warm start has never met, or what it has met and training has not."""

Answer = str | int | float
"""A final answer, in the form that the column `answer` has."""


@dataclass(frozen=True)
class Example:
    """One prompt. `id` is stable across runs and machines: splits and injected noise are keyed by it."""

    id: str
    prompt: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row (`answer`, ...), handed to reward functions as keyword lists."""


class Step(NamedTuple):
    """An environment's answer to one response of the policy."""

    messages: Sequence[Message]
    """What the environment says next (user or tool turns); empty when the episode is over."""
    reward: float | None
    """The reward of this turn, landing on its last policy token; None where only the final reward counts."""
    done: bool


class Environment(Protocol):
    """One episode. A single-turn task is the one-step case.

    One that has a method `figures() -> dict[str, float | None]` is asked for them at the end of an episode: evaluations
    report their means, over the episodes that have them.
    """

    def reset(self) -> Prompt:
        """Begin the episode and return what the policy sees first."""
        ...

    def step(self, response: str) -> Step:
        """Take the policy's response text (end token and stop string removed) and answer it."""
        ...


class SingleTurn:
    """The environment of an ordinary prompt: one response, then done; scoring is the reward function's matter."""

    def __init__(self, example: Example) -> None:
        self.example = example

    def reset(self) -> Prompt:
        return self.example.prompt

    def step(self, response: str) -> Step:
        del response
        return Step(messages=(), reward=None, done=True)


class Task(Protocol):
    """Prompts, splits and (where it is known) the truth."""

    @property
    def name(self) -> str: ...

    def split(self, name: str) -> Sequence[Example]:
        """The examples of `train`, `id` (held out, same distribution) or `ood`; empty if there is no such split."""
        ...

    def environment(self, example: Example) -> Environment: ...

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        """The verified reward of each completion, on top of what its environment gave; NaN where it is not known.

        None says the same, but where the environment gave a reward it adds nothing.
        """
        ...


class SplitTask:
    """The base of the tasks here: they hold their examples by split, and end after one response unless they say
    otherwise. A task of your own needs no base."""

    _splits: Mapping[str, Sequence[Example]]

    def split(self, name: str) -> Sequence[Example]:
        """The examples of `train`, `id` or `ood`; empty for any other name, unless the task has more."""
        return self._splits.get(name, ())

    def environment(self, example: Example) -> Environment:
        return SingleTurn(example)


@runtime_checkable
class HasFinalAnswer(Task, Protocol):
    """A task whose responses end in an answer that can be compared with others, so that samples can vote."""

    def final_answer(self, text: str) -> Answer | None:
        """The answer that a response gives, None if it gives none."""
        ...
