"""Dynamic sampling: which groups are replaced, by what, what it costs, and that a resume does not show."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.metrics import has_signal
from dvpo.tasks import Environment, Example, Reward
from dvpo.trainer import Trainer
from runs import Guessing, Parity, Talk, farthest, rows, run_config, trained, weights

SIZE = 3
"""Samples a prompt, as in `runs.SETTINGS`; prompts a step are 2."""


class Silent(Parity):
    """Every second prompt, or every one, pays the same (`rest`) for any response: nothing can be learnt from it."""

    def __init__(self, rest: Reward = 1.0, every: int = 2) -> None:
        super().__init__()
        self.rest, self.every = rest, every

    def true_reward(self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[Reward]:
        # By the place in the group: 0, 1, 0, whatever the model writes.
        numbers = [int(answer.rpartition(" ")[2]) for answer in columns["answer"]]
        return [self.rest if n % self.every == 0 else float(i % SIZE == 1) for i, n in enumerate(numbers)]


def number(example: Example) -> int:
    return int(example.id.rpartition(" ")[2])


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ([0.0, 1.0, 0.0], True),
        ([1.0, 1.0, 1.0], False),
        ([0.5, 0.5 + 1e-8], False),  # equal but for rounding
        ([math.nan, 1.0, 0.0], True),
        ([math.nan, math.nan, 1.0], False),  # one reward has nothing to be compared with
        ([math.nan, math.nan], False),
    ],
)
def test_a_group_has_signal_if_two_known_returns_differ(rewards: list[float], signal: bool) -> None:
    assert has_signal(torch.tensor(rewards)) == signal


@pytest.mark.parametrize("rest", [1.0, None])
def test_silent_groups_are_replaced_by_the_next_prompts_and_the_others_stay_where_they_are(
    tmp_path: Path, rest: Reward
) -> None:
    plain = Trainer(run_config(tmp_path / "plain"), task=Silent(rest))
    order = [plain.collector.sample(plain.prompts.next(1))[0].example for _ in range(16)]
    plain.close()
    settings = ["sampling.resample_rounds=9", "critic.privileged=answer"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Silent(rest))
    for _ in range(3):
        first = trainer.prompts.drawn
        rollout, collected = trainer.collect()
        drawn = order[first : trainer.prompts.drawn]
        # Place by place: a silent prompt hands its place to the next one that was drawn.
        places, queue = drawn[:2], drawn[2:]
        while any(number(example) % 2 == 0 for example in places):
            replaced = [i for i, example in enumerate(places) if number(example) % 2 == 0]
            for i in replaced:
                places[i] = queue.pop(0)
        assert not queue
        assert [e.example for e in collected.episodes] == [example for example in places for _ in range(SIZE)]
        assert [e.example for e in collected.sampled] == [example for example in drawn for _ in range(SIZE)]
        assert rollout.observed_B.tolist() == [0.0, 1.0, 0.0] * 2
        assert rollout.prompt_ids == tuple(e.example.id for e in collected.episodes)
        hints = [trainer.collector.encoder.text([t for t in row if t >= 0]) for row in rollout.hints_BH.tolist()]
        assert hints == [f"{prompt_id}\n" for prompt_id in rollout.prompt_ids]  # Parity's answers are its ids
    assert trainer.prompts.drawn > 6
    trainer.close()


def test_the_log_shows_one_answer_of_each_prompt_before_any_second_and_all_that_was_said_in_it(tmp_path: Path) -> None:
    trainer = Trainer(run_config(tmp_path / "run", "sampling.max_completion_length=40"), task=Talk())
    collected = trainer.collect()[1]
    shown = collected.completions(4)
    trainer.close()
    assert [row["sample"] for row in shown] == [0, 0, 1, 1]
    first, second, *again = [row["prompt_id"] for row in shown]
    assert first != second
    assert again == [first, second]
    ended = [collected.episodes[place].terminated for place in (0, SIZE, 1, SIZE + 1)]
    assert [row["truncated"] for row in shown] == [not end for end in ended]
    for row in shown:
        if "messages" in row:
            one, hint, two = row["messages"]
            assert hint == {"role": "user", "content": "?!"}
            assert row["completion"] == f"{one['content']}\n{two['content']}"
        else:
            assert row["truncated"]  # a `Guessing` takes two turns
    assert any("messages" in row for row in shown)


def test_rounds_are_bounded_a_step_keeps_its_size_and_every_rollout_is_counted(tmp_path: Path) -> None:
    task = Silent(every=1)
    trainer = trained(tmp_path / "run", "sampling.resample_rounds=2", "algorithm=grpo", task=task)
    assert [row["rollout/sampled"] for row in rows(trainer)] == [3 * 2 * SIZE] * 2
    assert trainer.prompts.drawn == 2 * 3 * 2
    off = trained(tmp_path / "off", "algorithm=grpo", task=task)
    assert [row["rollout/sampled"] for row in rows(off)] == [2 * SIZE] * 2
    assert off.prompts.drawn == 2 * 2


def test_extra_draws_are_visits(tmp_path: Path) -> None:
    trainer = Trainer(run_config(tmp_path / "run", "sampling.resample_rounds=4"), task=Silent(every=1))
    collected = [trainer.collect()[1] for _ in range(4)]  # 40 draws of 16 prompts
    seen: dict[str, int] = {}
    for episode in [e for one in collected for e in one.sampled if e.sample == 0]:
        assert episode.visit == seen.get(episode.example.id, 0)
        seen[episode.example.id] = episode.visit + 1
    assert max(seen.values()) == 3
    trainer.close()


def test_rates_are_estimated_on_all_that_was_sampled(tmp_path: Path) -> None:
    """On what was kept alone they would be rates among mixed groups."""
    settings = ["sampling.resample_rounds=3", "reward.trusted=1"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Silent(every=1))
    figures = trainer.train_step()
    assert figures["noise/trusted"] == figures["rollout/sampled"] == 4 * 2 * SIZE
    trainer.close()


class Paid(Guessing):
    """The first turn pays, too, and not always the same: the return counts, over all turns."""

    def step(self, response: str) -> Any:
        step = super().step(response)
        return step._replace(reward=float(len(response) % 2) / 2 if self.turn == 1 else 0.5)


class PaidTalk(Parity):
    def environment(self, example: Example) -> Environment:
        return Paid(example)


def test_it_works_over_several_turns_and_with_missing_rewards(tmp_path: Path) -> None:
    settings = [
        "sampling.resample_rounds=3",
        "sampling.max_completion_length=24",
        "noise.kind=missing",
        "noise.rate=0.5",
    ]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=PaidTalk())
    sizes = set()
    for _ in range(4):
        rollout, collected = trainer.collect()
        sizes.add(len(collected.sampled))
        for i, episode in enumerate(collected.episodes):
            length = len(episode.tokens)
            assert rollout.response_BT[i, :length].tolist() == episode.tokens
            assert rollout.turns_BT[i, :length].tolist() == episode.turns
        seen_B = rollout.rewarded_B
        torch.testing.assert_close(rollout.rewards_BT.sum(dim=1)[seen_B], rollout.observed_B[seen_B])
        groups = collected.scored.fields["observed_B"].split(SIZE)
        assert all(has_signal(group) for group in rollout.observed_B.split(SIZE)) or len(groups) > 2
    assert len(sizes) > 1
    trainer.close()


def test_a_resumed_run_draws_samples_and_ends_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    settings = ["sampling.resample_rounds=2", "checkpoint.every=2", "noise.kind=flip", "noise.rate=0.2"]
    whole = trained(tmp_path / "whole", *settings, "steps=4", task=Silent())
    trained(tmp_path / "parts", *settings, "steps=2", task=Silent())
    parts = trained(tmp_path / "parts", *settings, "steps=4", task=Silent(), resume=True)
    assert rows(parts) == rows(whole)
    assert sum(row["rollout/sampled"] for row in rows(whole)) > 4 * 2 * SIZE
    assert farthest(weights(parts), weights(whole)) == 0


def test_faults_of_a_replaced_group_are_logged_with_their_own_sample(tmp_path: Path) -> None:
    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        return [float("inf") if int(a.rpartition(" ")[2]) % 2 == 0 else float(i % 3 == 1)
                for i, a in enumerate(columns["answer"])]  # fmt: skip

    trainer = trained(tmp_path / "run", "sampling.resample_rounds=9", "steps=3", reward=reward)
    logged = rows(trainer, "faults")
    assert logged
    assert all(int(row["prompt_id"].rpartition(" ")[2]) % 2 == 0 for row in logged)
    assert sum(row["reward/faults"] for row in rows(trainer)) == len(logged)
    assert all(row["reward/missing"] == 0 for row in rows(trainer))


def test_a_group_that_differs_in_cut_responses_alone_has_no_signal_where_these_are_masked(tmp_path: Path) -> None:
    class Ended(Parity):
        """All that ended are worth 1, all that were cut 0."""

        def true_reward(self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
            return [float(len(ids) < 12) for ids in completion_ids]

    settings = ["sampling.resample_rounds=9", "sampling.max_completion_length=12", "steps=1"]
    sampled = [
        rows(trained(tmp_path / rule, *settings, f"advantage.truncation={rule}", task=Ended()))[0]["rollout/sampled"]
        for rule in ("terminal", "mask")
    ]
    assert sampled[0] < sampled[1]  # no group has a difference among those that ended: all rounds are used up


def test_a_group_of_one_cannot_be_judged() -> None:
    with pytest.raises(InputError, match=r"sampling.resample_rounds = 1 .*samples_per_prompt = 1: raise it"):
        load_config({"sampling": {"resample_rounds": 1, "samples_per_prompt": 1}})
