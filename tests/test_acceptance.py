"""Every algorithm trains on every task: a few steps of a tiny random model under flipped rewards.

The fast tests hold each row once and every task with a third of the rows; a new row joins by itself. The rest is slow.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvpo.algorithms import ALGORITHMS
from dvpo.batch import Rollout
from dvpo.collect import Collected
from dvpo.runlog import read_rows
from dvpo.settings import TaskConfig
from dvpo.tasks import Task
from dvpo.tasks.named import make_task
from dvpo.trainer import Trainer
from runs import run_config

TASKS = ("math", "science", "dialogue")
PAIRS = [(row, task) for row in ALGORITHMS for task in TASKS]
COVERING = [(row, TASKS[place % len(TASKS)]) for place, row in enumerate(ALGORITHMS)]
LENGTHS = {"math": 16, "science": 16, "dialogue": 64}
"""Tokens of a response: enough for the random model to end its turn now and then, and to be answered."""


@cache
def task_named(name: str) -> Task:
    return make_task(TaskConfig(name=name))


class Watched(Trainer):
    """Keeps what it trained on."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.rollouts: list[Rollout] = []

    def collect(self) -> tuple[Rollout, Collected]:
        rollout, collected = super().collect()
        self.rollouts.append(rollout)
        return rollout, collected


def weights(module: torch.nn.Module | None) -> list[Tensor]:
    return [] if module is None else [p.detach().clone() for p in module.parameters()]


def moved(before: list[Tensor], module: torch.nn.Module) -> bool:
    after = weights(module)
    assert all(p.isfinite().all() for p in after)
    return any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def check_mask(rollout: Rollout, task: str) -> None:
    """The mask holds the policy's words, rewards stand on them, and only a dialogue has words of anybody else."""
    response_BT = rollout.attention_BS[:, rollout.prompt_length :]
    assert rollout.mask_BT.any(dim=1).all()
    assert not (rollout.mask_BT & ~response_BT).any()
    assert torch.equal(rollout.mask_BT, rollout.turns_BT >= 0)
    assert not rollout.rewards_BT[~rollout.mask_BT].any()
    assert not rollout.sampler_logprobs_BT[~rollout.mask_BT].any()
    assert (rollout.sampler_logprobs_BT[rollout.mask_BT] < 0).all()
    answered_BT = response_BT & ~rollout.mask_BT
    if task == "dialogue":
        assert answered_BT.any()
        assert rollout.turns_BT.max() >= 1
    else:
        assert not answered_BT.any()
        assert rollout.turns_BT.max() == 0


def check_training(folder: Path, row: str, task: str) -> None:
    settings = ["noise.kind=flip", "noise.rate=0.4", f"sampling.max_completion_length={LENGTHS[task]}"]
    # A random model solves nothing: without the flips a group's rewards would be equal and no group method would learn.
    config = run_config(folder, f"algorithm={row}", f"task.name={task}", "evaluation.prompts=1", *settings)
    trainer = Watched(config, task=task_named(task))
    policy, critic = weights(trainer.policy.model), weights(trainer.critic)
    evaluations = trainer.train()

    assert list(evaluations) == [0, 2]
    assert moved(policy, trainer.policy.model)
    wanted = {"actor/loss", "actor/grad_norm", "actor/entropy", "reward/observed", "reward/true", "rollout/tokens"}
    if ALGORITHMS[row].critic == "none":
        assert trainer.critic is None
    else:
        assert moved(critic, trainer.critic)
        wanted |= {"critic/loss", "critic/grad_norm", "critic/value_error"}
    steps = [line for line in read_rows(folder / "metrics.jsonl") if "actor/loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line, rollout in zip(steps, trainer.rollouts, strict=True):
        assert wanted <= line.keys()
        assert all(math.isfinite(line[name]) for name in wanted)
        assert line["actor/skipped_updates"] == line["reward/faults"] == line["reward/missing"] == 0
        assert line["rollout/tokens"] == rollout.mask_BT.sum()
        assert line["reward/observed"] == pytest.approx(float(rollout.observed_B.mean()))
        check_mask(rollout, task)


def test_the_fast_pairs_hold_every_row_once_and_every_task_often():
    assert [row for row, _ in COVERING] == list(ALGORITHMS)
    assert all(sum(task == covered for _, covered in COVERING) >= 3 for task in TASKS)


@pytest.mark.parametrize(("row", "task"), COVERING)
def test_a_row_trains_on_its_task_of_the_rotation(tmp_path: Path, row: str, task: str):
    check_training(tmp_path / "run", row, task)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "task"), [pair for pair in PAIRS if pair not in COVERING])
def test_every_row_trains_on_every_task(tmp_path: Path, row: str, task: str):
    check_training(tmp_path / "run", row, task)
