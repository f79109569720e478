"""Rotation spares the best checkpoint and the last healthy one; evaluations and checkpoints fall due once."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from dvpo.checkpoint import load_state
from dvpo.errors import InputError
from dvpo.interrupt import Interrupted, handled
from dvpo.keeper import Keeper
from dvpo.loading import load_config
from dvpo.runlog import read_rows
from dvpo.settings_learning import CheckpointConfig
from dvpo.tasks import Example
from dvpo.trainer import Trainer
from runs import Parity, assert_equal, run_config

BEST = ["checkpoint.keep_best=true", "checkpoint.keep=1", "checkpoint.every=0", "evaluation.every=1"]


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


class Judged(Trainer):
    """Whose evaluations are made up: one figure a step."""

    scores = (0.2, 0.5, 0.4, 0.5, math.nan, 0.1)

    def evaluate_split(self, split: str):
        result = super().evaluate_split(split)
        return dataclasses.replace(result, summary={**result.summary, "reward": self.scores[self.step]})


def test_the_best_by_the_true_reward_of_held_out_prompts_stays_and_the_first_of_equals_counts(tmp_path: Path):
    Judged(run_config(tmp_path / "run", *BEST, "steps=5"), task=Parity()).train()
    assert kept(tmp_path / "run") == [1, 5]
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best == {"checkpoint": "checkpoint-1", "id/reward": 0.5}


def test_of_a_mix_the_best_is_the_best_mean_over_its_tasks(tmp_path: Path):
    policy = SimpleNamespace(model=nn.Linear(1, 1), writer=None)
    keeper = Keeper(tmp_path, CheckpointConfig(keep_best=True), {}, policy, None)
    # Means .5, .6, .55. By the first task alone it would be step 0, by the last step 2, by the better one step 0; with
    # `ood` counted it would be step 0 as well, (.9 + .1 + 1) / 3 against (.6 + .6 + 0) / 3.
    for step, (sums, logic, ood) in enumerate([(0.9, 0.1, 1.0), (0.6, 0.6, 0.0), (0.2, 0.9, 0.0)]):
        figures = {"eval/math/id/reward": sums, "eval/logic/id/reward": logic, "eval/math/ood/reward": ood}
        keeper.judge_evaluation(step, {**figures, "eval/math/id/accuracy": 1.0 - step / 2})
    assert keeper.best == (1, 0.6)


def test_a_start_that_nothing_surpasses_is_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Judged, "scores", (0.5, 0.4, 0.5, 0.3))
    Judged(run_config(tmp_path / "run", *BEST, "steps=3"), task=Parity()).train()
    assert kept(tmp_path / "run") == [0, 3]


def test_a_resumed_run_remembers_the_best(tmp_path: Path):
    config = run_config(tmp_path / "run", *BEST, "steps=3")
    Judged(config, task=Parity()).train()
    Judged(dataclasses.replace(config, steps=5), task=Parity(), resume=True).train()
    assert kept(tmp_path / "run") == [1, 5]


def test_without_keep_best_no_checkpoint_but_the_newest_stay(tmp_path: Path):
    settings = ["checkpoint.keep=1", "checkpoint.every=1", "evaluation.every=1", "steps=3"]
    Judged(run_config(tmp_path / "run", *settings), task=Parity()).train()
    assert kept(tmp_path / "run") == [3]
    assert not (tmp_path / "run" / "best.json").exists()


def test_keep_best_needs_evaluations_and_a_held_out_split(tmp_path: Path):
    class WithoutHeldOut(Parity):
        def split(self, name: str) -> list[Example]:
            return [] if name == "id" else list(super().split(name))

    with pytest.raises(InputError, match=r"keep_best = true chooses among evaluations, but evaluation\.every = 0"):
        load_config({"checkpoint": {"keep_best": True}})
    with pytest.raises(InputError, match="judges by the held-out split id, which the task parity lacks: give it one"):
        Trainer(run_config(tmp_path / "run", *BEST), task=WithoutHeldOut())
    assert not (tmp_path / "run").exists()


class FailsFrom(Trainer):
    """Whose critic's loss is NaN in some steps: skipped updates, sound weights, figures that are not finite."""

    failing = range(3, 99)

    def update(self, rollout, estimates):
        sound = self.row
        if self.step in self.failing:
            loss = sound.critic_loss
            self.row = dataclasses.replace(sound, critic_loss=lambda *given: {"loss": math.nan * loss(*given)["loss"]})
        figures = super().update(rollout, estimates)
        self.row = sound
        return figures


def test_the_last_checkpoint_of_a_step_with_finite_losses_is_never_rotated_away(tmp_path: Path):
    settings = ["checkpoint.every=1", "checkpoint.keep=1", "steps=6"]
    FailsFrom(run_config(tmp_path / "run", *settings), task=Parity()).train()
    assert kept(tmp_path / "run") == [2, 6]


def test_once_losses_are_finite_again_it_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FailsFrom, "failing", range(3, 5))
    settings = ["checkpoint.every=1", "checkpoint.keep=1"]
    for steps, left in ((4, [2, 4]), (6, [6])):
        config = run_config(tmp_path / "run", *settings, f"steps={steps}")
        FailsFrom(config, task=Parity(), resume=steps > 4).train()
        assert kept(tmp_path / "run") == left


def test_a_run_whose_losses_were_never_finite_has_no_healthy_checkpoint_to_keep(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(FailsFrom, "failing", range(1, 99))
    settings = ["checkpoint.every=1", "checkpoint.keep=1", "evaluation.every=0", "update.max_skipped=0"]
    FailsFrom(run_config(tmp_path / "run", *settings), task=Parity()).train()
    assert kept(tmp_path / "run") == [2]


# Where a run that is interrupted goes on


class InterruptedIn(Trainer):
    """Signals itself amid one call of a method, at a step."""

    method, at_step = "", -1

    def _then_signal(self, name: str) -> None:
        if (name, self.step) == (self.method, self.at_step):
            os.kill(os.getpid(), signal.SIGTERM)

    def collect(self):
        collected = super().collect()
        self._then_signal("collect")
        return collected

    def evaluate_split(self, split: str):
        result = super().evaluate_split(split)
        self._then_signal("evaluate_split")
        return result

    def _update_actor(self, *given):
        super()._update_actor(*given)
        self._then_signal("_update_actor")


@pytest.mark.parametrize(
    ("method", "at_step", "checkpoint"),
    [("evaluate_split", 0, 0), ("collect", 1, 0), ("collect", 3, 2), ("_update_actor", 3, 3), ("evaluate_split", 2, 2)],
)
def test_interrupted_anywhere_and_resumed_a_run_ends_the_same_and_no_evaluation_is_lost_or_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, at_step: int, checkpoint: int
):
    settings = ["steps=4", "evaluation.every=2", "critic.replay=1", "reward.trusted=0.5"]
    Trainer(run_config(tmp_path / "whole", *settings), task=Parity()).train()
    monkeypatch.setattr(InterruptedIn, "method", method)
    monkeypatch.setattr(InterruptedIn, "at_step", at_step)
    config = run_config(tmp_path / "run", *settings)
    with handled(), pytest.raises(Interrupted):
        InterruptedIn(config, task=Parity()).train()
    assert kept(tmp_path / "run") == [checkpoint]
    Trainer(config, task=Parity(), resume=True).train()
    assert_equal(tmp_path / "run", tmp_path / "whole")
    evaluated = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/id/reward" in row]
    assert evaluated == [0, 2, 4]


def test_the_state_at_the_end_of_an_interrupted_step_would_be_the_wrong_one(tmp_path: Path, monkeypatch):
    """Sampling has moved the data cursor: a checkpoint of the moment itself would skip prompts."""
    monkeypatch.setattr(InterruptedIn, "method", "collect")
    monkeypatch.setattr(InterruptedIn, "at_step", 2)
    trainer = InterruptedIn(run_config(tmp_path / "run", "steps=4"), task=Parity())
    with handled(), pytest.raises(Interrupted):
        trainer.train()
    saved = load_state(tmp_path / "run" / "checkpoint-1")["prompts"]["drawn"]
    assert (saved, trainer.prompts.drawn) == (2, 4)
