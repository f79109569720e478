"""Alarms: each rings at what it is for and at nothing else; a healthy run is silent; what rings can end a run."""

import math
import random
import warnings
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from dvpo.alarms import NAMES, Alarms
from dvpo.checkpoint import latest_checkpoint
from dvpo.errors import RunStoppedError
from dvpo.runlog import read_rows
from dvpo.settings_learning import AlarmsConfig
from dvpo.trainer import Trainer
from runs import Parity, run_config

HEALTHY = {
    "actor/entropy": 0.03,
    "actor/kl": 2e-3,
    "actor/kl_reference": 0.06,
    "actor/reward_reach": 0.6,
    "actor/sampler_mismatch": 3e-7,
    "critic/value_error": 0.7,
    "critic/return_size": 0.7,
}
"""As in the first step of the embedded model's default run."""
WINDOW = 5


class Watched:
    """Alarms, the steps that they were shown, and what they put on record."""

    def __init__(self, **settings: Any) -> None:
        self.alarms = Alarms(AlarmsConfig(**{"window": WINDOW, **settings}))
        self.step, self.rows = 0, []

    def record(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.rows += [{"step": step, **row} for row in rows]

    def show(self, **figures: float) -> list[str]:
        """Names of what rings after a step that is healthy but for these figures."""
        self.step += 1
        named = {key.replace("__", "/"): value for key, value in figures.items()}
        rung = self.alarms.on_step(self.step, {**HEALTHY, **named}, self.record)
        return [name.removeprefix("alarm/") for name, value in rung.items() if value]

    def evaluate(self, accuracy: float) -> None:
        """An evaluation of 100 items, its interval about two deviations to either side."""
        half = 2 * math.sqrt(accuracy * (1 - accuracy) / 100)
        key = "eval/id/accuracy"
        figures = {key: accuracy, f"{key}_low": accuracy - half, f"{key}_high": accuracy + half}
        self.alarms.on_evaluation(self.step, figures, self.record)


def test_the_names_are_those_that_a_config_may_stop_at():
    assert set(get_args(get_args(get_type_hints(AlarmsConfig)["stop"])[0])) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "bad", "still_good"),
    [
        ("entropy", {"actor__entropy": 0.0014}, {"actor__entropy": 0.0016}),  # .05 times the .03 of the start
        ("kl", {"actor__kl": 1.01}, {"actor__kl": 0.99}),
        ("kl", {"actor__kl": math.inf}, {"actor__kl": math.nan}),
        ("kl", {"actor__kl_reference": 2.1}, {"actor__kl_reference": 1.9}),
        ("value", {"critic__value_error": 7.1}, {"critic__value_error": 6.9}),  # 10 times .7
        ("reach", {"actor__reward_reach": 0.099}, {"actor__reward_reach": 0.101}),
        ("mismatch", {"actor__sampler_mismatch": 0.11}, {"actor__sampler_mismatch": 0.09}),
    ],
)
@pytest.mark.filterwarnings("ignore:step")
def test_an_alarm_rings_beyond_its_bound_until_the_figure_is_back(name, bad, still_good):
    watched = Watched(kl_reference=2.0)
    assert [watched.show() for _ in range(WINDOW)] == [[]] * WINDOW
    assert watched.show(**still_good) == []
    assert watched.show(**bad) == watched.show(**bad) == [name]
    assert watched.show() == []
    [row] = watched.rows  # once, when it began
    assert (row["step"], row["kind"], row["alarm"]) == (WINDOW + 2, "alarm", name)
    assert next(iter(bad)).replace("__", "/") in row["message"]


def test_a_bound_of_0_is_no_alarm_and_a_figure_that_is_not_logged_neither():
    watched = Watched(entropy=0, kl=0, kl_reference=0, value=0, mismatch=0, window=0)
    figures = {"actor__kl": 9.0, "actor__kl_reference": 9.0, "critic__value_error": 1e9, "actor__sampler_mismatch": 9.0}
    assert [watched.show(**figures, actor__entropy=0.0) for _ in range(30)] == [[]] * 30
    assert not any(Alarms(AlarmsConfig()).on_step(1, {}, watched.record).values())


def test_the_value_is_held_against_the_largest_returns_so_far_and_not_against_a_step_without_any():
    watched = Watched()
    assert (
        watched.show(critic__value_error=0.9, critic__return_size=0.0) == []
    )  # no return yet: nothing to explode from
    watched.show(critic__return_size=1.0)
    assert watched.show(critic__value_error=0.9, critic__return_size=0.01) == []


def rewards(means: list[float], spread: float = 0.02, seed: int = 0) -> list[float]:
    draws = random.Random(seed)
    return [mean + draws.gauss(0, spread) for mean in means]


def shown(watched: Watched, observed: list[float], true: list[float]) -> list[str]:
    """Everything that rang."""
    steps = zip(observed, true, strict=True)
    return [name for o, t in steps for name in watched.show(reward__observed=o, reward__true=t)]


@pytest.mark.filterwarnings("ignore:step")
def test_an_observed_reward_that_rises_while_the_true_one_falls_is_hacking():
    watched = Watched()
    rung = shown(watched, rewards([0.5] * 5 + [0.7] * 5), rewards([0.5] * 5 + [0.3] * 5, seed=1))
    assert set(rung) == {"hacking"}
    assert "while reward/true fell from" in watched.rows[0]["message"]


@pytest.mark.parametrize(
    ("observed", "true"),
    [
        ([0.5] * 10 + [0.7] * 10, [0.5] * 10 + [0.7] * 10),  # learning
        ([0.5] * 10 + [0.7] * 10, [0.5] * 20),  # the true one stands still
        ([0.5] * 10 + [0.3] * 10, [0.5] * 10 + [0.3] * 10),  # forgetting: both fall
        ([0.5] * 200, [0.5] * 200),  # nothing happens for long
        ([0.5] * 10 + [0.7] * 10, [math.nan] * 20),  # the truth is not known
        (
            [0.5] * 10 + [0.7] * 10,
            [0.5] * 5 + [0.3] * 7 + [math.nan] * 7 + [0.3],
        ),  # it fell before, and was not seen since
    ],
)
def test_any_other_course_of_the_rewards_is_none(observed, true):
    assert shown(Watched(), rewards(observed), rewards(true, seed=1)) == []


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize(
    ("observed", "true", "rung"),
    [
        # Pairs that differ by 1 have variance 1/2, the difference of two such means the error sqrt(1/4 + 1/4) = 0.707:
        # 2.5 is 3.5 of them, 2 is 2.8.
        ([0, 1, 2.5, 3.5], [3.5, 2.5, 1, 0], ["hacking"]),
        ([0, 1, 2, 3], [3.5, 2.5, 1, 0], []),
        ([0, 1, 2.5, 3.5], [3, 2, 1, 0], []),
    ],
)
def test_both_means_must_have_moved_by_three_standard_errors(observed, true, rung):
    assert shown(Watched(window=2), observed, true) == rung


@pytest.mark.filterwarnings("ignore:step")
def test_a_held_out_accuracy_that_falls_while_the_observed_reward_rises_is_hacking_until_it_is_back():
    watched = Watched()
    watched.evaluate(0.6)  # before training: the first steps' reward is what it is held against
    assert shown(watched, rewards([0.5] * 5), [math.nan] * 5) == []
    assert shown(watched, rewards([0.8] * 5, seed=1), [math.nan] * 5) == []
    watched.evaluate(0.3)
    assert watched.show() == ["hacking"]
    assert "held-out eval/id/accuracy = 0.300" in watched.rows[0]["message"]
    watched.evaluate(0.6)
    assert watched.show() == []
    watched.evaluate(0.3)  # of equal evaluations the first counts: since then the observed reward has risen
    assert watched.show() == ["hacking"]


def test_a_held_out_accuracy_that_falls_within_its_interval_or_with_the_reward_is_none():
    watched = Watched()
    watched.evaluate(0.6)
    shown(watched, rewards([0.5] * 5) + rewards([0.8] * 5, seed=1), [math.nan] * 10)
    watched.evaluate(0.5)  # [.4, .6] and [.5, .7] overlap
    assert watched.show() == []
    shown(watched, rewards([0.5] * 5, seed=2), [math.nan] * 5)
    watched.evaluate(0.2)  # bad, but not hacked: the observed reward is back where it began
    assert watched.show() == []


@pytest.mark.filterwarnings("ignore:step")
def test_alarms_that_go_on_from_their_state_ring_as_if_never_stopped():
    observed, true = rewards([0.5] * 5 + [0.7] * 5), rewards([0.5] * 5 + [0.3] * 5, seed=1)
    whole, first, second = Watched(), Watched(), Watched()
    expected = shown(whole, observed, true)
    rung = shown(first, observed[:8], true[:8])
    second.alarms.load_state_dict(first.alarms.state_dict())
    assert rung + shown(second, observed[8:], true[8:]) == expected != []
    assert second.alarms.state_dict() == whole.alarms.state_dict()
    judged, resumed = Watched(), Watched()
    judged.evaluate(0.6)
    shown(judged, rewards([0.5] * 5) + rewards([0.8] * 5, seed=1), [math.nan] * 10)
    judged.evaluate(0.3)
    resumed.alarms.load_state_dict(judged.alarms.state_dict())
    assert resumed.show() == judged.show() == ["hacking"]  # until the next evaluation


# In a run


def test_a_healthy_run_rings_nothing(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "step")
        trainer = Trainer(run_config(tmp_path / "run", "steps=12", "alarms.window=4"), task=Parity())
        trainer.train()
    metrics = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "actor/kl" in row]
    assert [row[f"alarm/{name}"] for row in metrics for name in NAMES] == [0.0] * 6 * 12
    assert (tmp_path / "run" / "faults.jsonl").read_text() == ""


def with_other_log_probs_in_step_2(folder: Path, *settings: str) -> Trainer:
    trainer = Trainer(run_config(folder, "steps=3", *settings), task=Parity())
    play = trainer.collector.sample

    def sample(draws: Any) -> Any:
        episodes = play(draws)
        for episode in episodes if trainer.step == 2 else []:
            episode.logprobs = [logprob - 0.3 for logprob in episode.logprobs]
        return episodes

    trainer.collector.sample = sample
    return trainer


def test_an_alarm_is_a_warning_a_row_and_a_metric_and_the_run_goes_on(tmp_path: Path):
    trainer = with_other_log_probs_in_step_2(tmp_path / "run")
    with pytest.warns(UserWarning, match="step 2: alarm mismatch: actor/sampler_mismatch = 0.3"):
        trainer.train()
    [row] = read_rows(trainer.folder / "faults.jsonl")
    assert (row["step"], row["alarm"]) == (2, "mismatch")
    metrics = [row for row in read_rows(trainer.folder / "metrics.jsonl") if "actor/kl" in row]
    assert [row["alarm/mismatch"] for row in metrics] == [0.0, 1.0, 0.0]


@pytest.mark.filterwarnings("ignore:step")
def test_an_alarm_that_the_config_stops_at_ends_the_run_with_a_checkpoint(tmp_path: Path):
    trainer = with_other_log_probs_in_step_2(tmp_path / "run", "alarms.stop=[kl, mismatch]")
    with pytest.raises(RunStoppedError, match=r"^step 2: alarm mismatch: .* `--resume` goes on from"):
        trainer.train()
    assert latest_checkpoint(trainer.folder).name == "checkpoint-2"
