"""Rewards added up: the arithmetic, what a missing part does, who is to blame, and what is logged."""

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dvpo.core.masks import identity
from dvpo.errors import InputError
from dvpo.faults import refuse_broken_reward
from dvpo.loading import load_config
from dvpo.noise import make_noise
from dvpo.reward_mix import Part, RewardMix
from dvpo.rewards import Fault, Scores
from dvpo.scoring import open_reward
from dvpo.settings import NoiseConfig
from dvpo.tasks import Reward
from dvpo.trainer import Trainer
from runs import Parity, run_config

FUNCTIONS = """
import os, time

def length(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]

def odd(completion_ids, **columns):
    return [None if sum(ids) % 2 else 1.0 for ids in completion_ids]

def broken(completion_ids, **columns):
    if any(sum(ids) % 2 for ids in completion_ids):
        raise ValueError("an odd one")
    return [2.0] * len(completion_ids)

def words(completions, **columns):
    return ["good"] * len(completions)

def meeting(mine, other):
    open(mine, "w").close()
    end = time.monotonic() + 20
    while not os.path.exists(other):
        if time.monotonic() > end:
            raise TimeoutError("nobody came")
        time.sleep(0.01)

def one(completions, **columns):
    meeting("one", "other")
    return [1.0] * len(completions)

def other(completions, **columns):
    meeting("other", "one")
    return [2.0] * len(completions)

def endless(completions, **columns):
    time.sleep(60)

def lot(completions, **columns):
    return [float(len(completions))] * len(completions)

async def async_lot(completions, **columns):
    return lot(completions)
"""


class Source:
    """A reward that remembers whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def __call__(self, *arguments: Any) -> Scores:
        raise AssertionError("asked by the scorer, not by the mix")

    def close(self) -> None:
        self.closed = True


def mixed(weights: list[float], *rewards: list[Reward]) -> Scores:
    mix = RewardMix([Part(f"part{i}", weight, None) for i, weight in enumerate(weights)])
    return mix([Scores(values, []) for values in rewards])


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixed_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# The sum


def test_numbers_are_multiplied_by_their_weights_and_added() -> None:
    # 1 - .5 * 4 = -1;  0 - .5 * 2 = -1;  2 - .5 * 0 = 2
    assert mixed([1, -0.5], [1.0, 0.0, 2.0], [4.0, 2.0, 0.0]) == Scores([-1.0, -1.0, 2.0], [])


def test_a_number_joins_the_last_entry_of_a_list_and_lists_are_added_turn_by_turn() -> None:
    (reward,) = mixed([1, 10, 2], [[1.0, 2.0]], [0.5], [[3.0, 4.0]]).rewards
    assert reward == [1 + 2 * 3, 2 + 10 * 0.5 + 2 * 4]


@pytest.mark.parametrize("missing", [None, math.nan, [1.0, None]])
def test_a_response_that_one_part_has_no_opinion_of_has_no_reward_and_that_is_no_fault(missing: Reward) -> None:
    assert mixed([1, 1], [1.0, 1.0], [missing, 2.0]) == Scores([None, 3.0], [])


def test_a_part_of_weight_0_counts_in_nothing_but_must_have_an_opinion() -> None:
    assert mixed([1, 0], [1.0, 1.0], [7.0, None]).rewards == [1.0, None]


def test_lists_of_two_lengths_are_a_fault_that_names_both_parts() -> None:
    scores = mixed([1, 1], [[1.0, 2.0], 1.0], [[1.0] * 7, 1.0])
    assert scores.rewards == [None, 2.0]
    assert scores.faults == [Fault("wrong_length", 0, "the parts part0 (2) and part1 (7) give unequal lists")]


def test_an_empty_list_is_a_fault_beside_a_number_too() -> None:
    scores = mixed([1.0, 1.0], [[], [1.0]], [2.0, 3.0])
    assert scores.rewards == [None, [4.0]]
    assert scores.faults == [Fault("wrong_length", 0, "the parts part0 give an empty list")]


def test_a_fault_keeps_kind_and_sample_and_says_whose_it_is() -> None:
    mix = RewardMix([Part("quick", 1, None), Part("slow", 1, None)])
    scores = mix([Scores([1.0, 1.0], []), Scores([1.0, None], [Fault("timeout", 1, "no answer within 1 s")])])
    assert scores == Scores([2.0, None], [Fault("timeout", 1, "slow: no answer within 1 s")])


def test_figures_are_those_of_each_part_before_its_weight_and_begin_anew_when_they_were_read() -> None:
    mix = RewardMix([Part("a", 2, None), Part("b", -1, None)])
    mix.observe([Scores([1.0, [1.0, 2.0]], []), Scores([None, 4.0], [])])
    mix.observe([Scores([5.0], []), Scores([math.nan], [])])
    assert mix.figures(identity) == {
        "reward/part/a": 3.0,  # (1 + 3 + 5) / 3
        "reward/part/a/missing": 0.0,
        "reward/part/b": 4.0,
        "reward/part/b/missing": pytest.approx(2 / 3),
    }
    assert mix.figures(identity) == {}


def test_closing_a_mix_closes_every_part() -> None:
    sources = [Source(), Source()]
    RewardMix([Part("a", 1, sources[0]), Part("task", 1, None), Part("b", 1, sources[1])]).close()
    assert all(source.closed for source in sources)


# In a run


def mix_of(*parts: str) -> str:
    return f"reward.mix=[{', '.join(parts)}]"


@pytest.mark.usefixtures("functions")
def test_a_run_adds_up_the_task_and_a_function_and_logs_each(tmp_path: Path) -> None:
    parts = mix_of("{function: task, weight: 2}", "{function: 'mixed_rewards:length', weight: -0.5}")
    Trainer(run_config(tmp_path / "run", "algorithm=ppo", parts), task=Parity()).train()
    for row in rows(tmp_path / "run"):
        if "reward/observed" in row:
            assert row["reward/observed"] == pytest.approx(
                2 * row["reward/part/task"] - 0.5 * row["reward/part/length"]
            )
            assert row["reward/part/task"] == pytest.approx(row["reward/true"])
            assert (row["reward/part/task/missing"], row["reward/faults"]) == (0, 0)


@pytest.mark.usefixtures("functions")
def test_functions_are_asked_side_by_side(tmp_path: Path) -> None:
    parts = mix_of("{function: 'mixed_rewards:one'}", "{function: 'mixed_rewards:other'}")
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=ppo", parts), task=Parity())
    rollout, collected = trainer.collect()  # each waits for the other
    trainer.close()
    assert collected.faults()[0] == []
    assert set(rollout.observed_B.tolist()) == {3.0}


@pytest.mark.usefixtures("functions")
def test_async_functions_are_called_for_each_response_and_the_others_of_the_mix_for_the_batch(tmp_path: Path) -> None:
    parts = mix_of("{function: 'mixed_rewards:lot', weight: 10}", "{function: 'mixed_rewards:async_lot'}")
    config = run_config(tmp_path / "run", "algorithm=ppo", parts, "reward.concurrency=2")
    trainer = Trainer(config, task=Parity())
    rollout, _ = trainer.collect()
    trainer.close()
    assert rollout.observed_B.tolist() == [10.0 * len(rollout) + 1.0] * len(rollout)


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("reward", "asked"),
    [
        (mix_of("{function: task}", "{function: 'mixed_rewards:lot'}"), "mixed_rewards:lot"),
        ("reward.function=mixed_rewards:lot", "mixed_rewards:lot"),
        ("reward.function=task", "what knows the rewards here, no function"),
    ],
)
def test_a_concurrency_that_no_function_is_async_for_is_refused(reward: str, asked: str) -> None:
    with pytest.raises(
        InputError, match=rf"reward\.concurrency = 2 is for `async def` .* none among {asked}: set it to 0"
    ):
        open_reward(load_config(None, [reward, "reward.concurrency=2"]), Parity())


@pytest.mark.usefixtures("functions")
def test_an_interrupt_ends_all_functions_of_a_mix_at_once(tmp_path: Path) -> None:
    parts = mix_of("{function: 'mixed_rewards:endless'}", "{function: 'mixed_rewards:endless', name: again}")
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=ppo", parts), task=Parity())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before, start = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            trainer.collect()
    finally:
        signal.signal(signal.SIGALRM, before)
        trainer.close()
    assert time.monotonic() - start < 20


@pytest.mark.usefixtures("functions")
def test_a_mix_of_the_task_alone_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    logged = {}
    for name, setting in (("plain", "reward.function=task"), ("mix", mix_of("{function: task}"))):
        noise = ("noise.kind=flip", "noise.rate=0.3")
        Trainer(run_config(tmp_path / name, "algorithm=ppo", setting, *noise), task=Parity()).train()
        logged[name] = [
            {key: value for key, value in row.items() if not key.startswith(("time/", "reward/part"))}
            for row in rows(tmp_path / name)
        ]
    assert logged["mix"] == logged["plain"]


@pytest.mark.usefixtures("functions")
def test_noise_acts_on_the_sum(tmp_path: Path) -> None:
    parts = mix_of("{function: task}", "{function: task, name: again, weight: 2}")
    noise = ("noise.kind=flip", "noise.rate=1", "noise.high=3", "sampling.prompts_per_step=8")
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=ppo", parts, *noise), task=Parity())
    rollout, _ = trainer.collect()
    trainer.close()
    assert rollout.observed_B.tolist() == (3 - 3 * rollout.true_B).tolist()
    assert 0 < rollout.true_B.mean() < 1


@pytest.mark.usefixtures("functions")
def test_a_part_that_fails_costs_its_samples_their_reward_and_the_run_goes_on(tmp_path: Path) -> None:
    parts = mix_of("{function: task}", "{function: 'mixed_rewards:broken'}", "{function: 'mixed_rewards:odd'}")
    Trainer(run_config(tmp_path / "run", "algorithm=ppo", parts), task=Parity()).train()
    steps = [row for row in rows(tmp_path / "run") if "reward/missing" in row]
    faults = rows(tmp_path / "run", "faults")
    assert len(steps) == 2
    assert faults
    assert all(fault["message"].startswith("broken: ") for fault in faults)
    for row in steps:
        # Both abstain on odd sums, one by a fault and one by its own will.
        assert row["reward/part/broken/missing"] == row["reward/part/odd/missing"] == row["reward/missing"]
        assert row["reward/faults"] == 6 * row["reward/missing"]


@pytest.mark.usefixtures("functions")
def test_without_truth_the_mix_judges_evaluations_too_and_they_count_in_no_steps_figures(tmp_path: Path) -> None:
    class Unknown(Parity):
        knows_truth = False

        def true_reward(self, prompts: Any, *rest: Any, **columns: Any) -> list[Reward]:
            return [None] * len(prompts)

    parts = mix_of("{function: 'mixed_rewards:length', weight: -1}")
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=ppo", parts, "noise.kind=random"), task=Unknown())
    assert trainer.evaluate()["eval/id/reward"] <= -1  # without noise
    assert trainer.scorer.figures(identity) == {}
    trainer.close()


# What the user can mend


@pytest.mark.usefixtures("functions")
def test_a_mix_of_which_every_part_answers_in_the_wrong_form_ends_the_first_step(tmp_path: Path) -> None:
    twice = mix_of("{function: 'mixed_rewards:words'}", "{function: 'mixed_rewards:words', name: more}")
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=ppo", twice), task=Parity())
    with pytest.raises(InputError, match=r"every reward of the first step is unusable, words: returned str"):
        trainer.train()


def test_a_broken_part_beside_a_sound_one_leaves_no_reward_either_and_is_refused() -> None:
    faults = [Fault("wrong_type", i, "words: returned str") for i in (0, 1, 0, 1)]
    with pytest.raises(InputError):
        refuse_broken_reward(faults, 2)
    refuse_broken_reward(faults, 4)  # two of four have a reward


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("{function: 'mixed_rewards:none'}", "reward.mix.1.function: 'mixed_rewards:none' could not be imported"),
        ("{function: nonsense}", "reward.mix.1.function: 'nonsense' is no name of a function"),
    ],
)
def test_a_part_that_cannot_be_opened_is_named_by_its_place(part: str, words: str) -> None:
    config = load_config(None, [mix_of("{function: 'mixed_rewards:length'}", part)])
    with pytest.raises(InputError) as caught:
        open_reward(config, Parity())
    assert words in str(caught.value)


def test_a_task_without_truth_cannot_be_a_part_and_a_function_in_python_none_beside_a_mix() -> None:
    task = Parity()
    config = load_config(None, [mix_of("{function: task}")])
    with pytest.raises(InputError, match="exclude each other"):
        open_reward(config, task, lambda prompts, **_: [0.0] * len(prompts))
    task.knows_truth = False  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"reward\.mix\.0\.function = task, but the task parity cannot judge"):
        open_reward(config, task)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((mix_of("{function: task}", "{function: task}"),), "reward.mix has two parts named task: give each a name"),
        ((mix_of("{function: task}"), "reward.function=math_verify"), "make it a part of the mix, or drop one"),
        ((mix_of("{function: task, wight: 2}"),), "did you mean reward.mix.0.weight?"),
        ((mix_of("{function: task, weight: .inf}"),), "reward.mix.0.weight = inf is not valid"),
        ((mix_of("{function: task, name: a b}"),), "'a b' is no name for the log"),
        ((mix_of("{weight: 1}"),), "reward.mix.0.function"),
    ],
)
def test_a_mix_that_could_not_be_logged_or_meant_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, settings)
    assert words in str(caught.value)


def test_parts_are_named_after_their_function_or_folder() -> None:
    parts = [{"function": name} for name in ("task", "math_verify", "my.module:Class.score", "path:./models/judge/")]
    config = load_config({"reward": {"mix": parts}})
    assert [part.label for part in config.reward.mix] == ["task", "math_verify", "score", "judge"]


def test_noise_of_a_missing_mix_stays_missing() -> None:
    noise = make_noise(NoiseConfig(kind="flip", rate=1.0), seed=0)
    rewards = mixed([1, 1], [1.0], [None]).rewards
    assert noise(rewards, ["a"], [0], [0], [[1]]) == [None]
