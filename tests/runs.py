"""Runs that take milliseconds a step: a random two-layer model, a task whose truth any text has; what they leave."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from dvpo.batch import Rollout
from dvpo.config import Config
from dvpo.embedded import make_config, make_model, make_tokenizer
from dvpo.loading import load_config
from dvpo.runlog import STREAMS, TIME_PREFIX, read_rows
from dvpo.sampling import Turn
from dvpo.tasks import Environment, Example, Prompt, Reward, SingleTurn, Step
from dvpo.trainer import Trainer

_folders: list[TemporaryDirectory[str]] = []

SETTINGS: dict[str, Any] = {
    "steps": 2,
    "sampling": {"prompts_per_step": 2, "samples_per_prompt": 3, "max_completion_length": 12, "temperature": 1.2},
    "critic": {"num_quantiles": 8},
    "evaluation": {"prompts": 2},
    "checkpoint": {"every": 0},
}


# Steps that are linear in the gradient (Adam with a large eps): rounding stays rounding, and is not divided by itself.
LINEAR = [f"{name}.{key}" for name in ("policy_optimiser", "critic_optimiser") for key in ("eps=10", "lr=1")]


@cache
def model_folder() -> str:
    """A saved random model with the embedded tokenizer; each token ends the response with probability 1/8 or so."""
    folder = TemporaryDirectory(prefix="dvpo-tiny-")
    _folders.append(folder)  # removed when the interpreter ends
    model = make_model(make_config(hidden_size=32, num_hidden_layers=2, intermediate_size=64))
    model.generation_config.eos_token_id = [1, *range(8, 40)]
    model.save_pretrained(folder.name)
    make_tokenizer().save_pretrained(folder.name)
    return folder.name


def run_config(output: Path, *overrides: str) -> Config:
    return load_config(SETTINGS, [f"model.path={model_folder()}", f"output={output}", *overrides])


class Parity:
    """Right is a response whose token ids add up to an even number: about half of them, whatever the model."""

    name = "parity"

    def __init__(self, rewards: Sequence[Reward] = ()) -> None:
        self.rewards = list(rewards)
        """Given instead of the truth, to the first responses of every call."""

    def split(self, name: str) -> Sequence[Example]:
        count = {"train": 16, "id": 2, "ood": 2}.get(name, 0)
        texts = [f"{name} {'word ' * (i % 3)}{i}" for i in range(count)]
        return [Example(text, [{"role": "user", "content": text}], {"answer": text}) for text in texts]

    def environment(self, example: Example) -> Environment:
        return SingleTurn(example)

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        truth: list[Reward] = [float(sum(ids) % 2 == 0) for ids in completion_ids]
        return [*self.rewards[: len(truth)], *truth[len(self.rewards) :]]


class Unread:
    """A sampler of random tokens that never asks the model: runs that round differently have the same responses."""

    def sample(self, contexts: Sequence[Sequence[int]], budgets: Sequence[int], seeds: Sequence[int]) -> list[Turn]:
        turns = []
        for budget, seed in zip(budgets, seeds, strict=True):
            draw = random.Random(seed)
            tokens = [draw.randrange(100, 250) for _ in range(draw.randint(1, budget))]
            turns.append(Turn(tokens, [-5.5] * len(tokens), finished=len(tokens) < budget))
        return turns


class Guessing:
    """Two turns: the environment answers the first with a hint of several tokens; each turn has a reward."""

    def __init__(self, example: Example) -> None:
        self.example, self.turn = example, 0

    def reset(self):
        return self.example.prompt

    def step(self, response: str) -> Step:
        self.turn += 1
        hint = [{"role": "user", "content": "?!"}]
        return Step(hint if self.turn == 1 else (), reward=0.25 * self.turn, done=self.turn == 2)


class Talk(Parity):
    def environment(self, example: Example) -> Environment:
        return Guessing(example)


def trained(folder: Path, *overrides: str, task: Any = None, kind: type[Trainer] = Trainer, **given: Any) -> Trainer:
    """A tiny run to its last step."""
    trainer = kind(run_config(folder, *overrides), task=task or Parity(), **given)
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> list[Tensor]:
    critic = list(trainer.critic.parameters()) if trainer.critic else []
    return [p.detach().clone() for p in (*trainer.policy.model.parameters(), *critic)]


def farthest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))


def rows(trainer: Trainer, name: str = "metrics") -> list[dict[str, Any]]:
    """The log without evaluations and wall-clock figures."""
    return [
        {key: value for key, value in row.items() if not key.startswith(TIME_PREFIX)}
        for row in read_rows(trainer.folder / f"{name}.jsonl")
        if not any(key.startswith("eval/") for key in row)
    ]


def rollout_of(trainer: Trainer) -> Rollout:
    trainer.step += 1
    rollout, _ = trainer.collect()
    return rollout


def left_behind(folder: Path) -> dict[str, Any]:
    """Every row of the logs without wall-clock figures, and the bytes of the final weights."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    logs = {
        name: [
            {key: value for key, value in row.items() if not key.startswith(TIME_PREFIX)}
            for row in read_rows(folder / name)
        ]
        for name in STREAMS
    }
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(last.rglob("*.safetensors"))}
    assert {"policy", "critic"} <= {Path(name).parent.name for name in weights}
    return {**logs, **weights}


def assert_equal(folder: Path, uninterrupted: Path) -> None:
    """Two runs ended alike: the same rows, the same bytes of the final weights."""
    one, other = left_behind(folder), left_behind(uninterrupted)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], name
