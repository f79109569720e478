"""Runs that take milliseconds a step: a random two-layer model, and a task whose truth any text has."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dvpo.config import Config, load_config
from dvpo.embedded import make_config, make_model, make_tokenizer
from dvpo.tasks import Environment, Example, Prompt, Reward, SingleTurn

_folders: list[TemporaryDirectory[str]] = []

SETTINGS: dict[str, Any] = {
    "steps": 2,
    "sampling": {"prompts_per_step": 2, "samples_per_prompt": 3, "max_completion_length": 12, "temperature": 1.2},
    "critic": {"num_quantiles": 8},
    "evaluation": {"prompts": 2},
    "checkpoint": {"every": 0},
}


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
