"""Scoring: where rewards land, what a missing one becomes, and who is asked."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.noise import make_noise
from dvpo.rewards import Fault
from dvpo.sampling import Episode
from dvpo.scoring import Scored, Scorer, join, longest_scoring, open_reward, place
from dvpo.settings import NoiseConfig
from dvpo.tasks import Example, Reward, total

NOTHING = make_noise(NoiseConfig(), seed=0)
ALL_WRONG = make_noise(NoiseConfig(kind="flip", rate=1.0), seed=0)


def episode(
    turns: list[int], name: str = "a", turn_rewards: list[float | None] | None = None, **columns: Any
) -> Episode:
    """One token for each entry of `turns`, the policy's turn or -1; its text is its name."""
    made = Episode(Example(name, "prompt of " + name, columns), 0, 0, [9], tokens=[*range(len(turns))], turns=turns)
    made.turn_rewards = [None] * (max(turns) + 1) if turn_rewards is None else turn_rewards
    made.messages = [{"role": "assistant", "content": name}]
    return made


TWO_TURNS = [0, 0, -1, -1, 1, 1, 1]


class Known:
    """A task that knows the truth of each text."""

    name = "known"

    def __init__(self, truth: dict[str, Reward], knows_truth: bool = True) -> None:
        self.truth, self.columns, self.knows_truth = truth, {}, knows_truth

    def split(self, name: str) -> list[Example]:
        return [Example(key, key) for key in self.truth] if name == "train" else []

    def true_reward(self, prompts: Any, completions: list[str], completion_ids: Any, **columns: Any) -> list[Reward]:
        self.columns = columns
        return [self.truth.get(text) for text in completions]


class Asked:
    """A guarded reward function that remembers its arguments."""

    def __init__(self, rewards: list[Reward], faults: list[Fault] | None = None) -> None:
        self.answer, self.arguments = SimpleNamespace(rewards=rewards, faults=faults or []), ()

    def __call__(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return self.answer


def tolist(tensor: torch.Tensor) -> list[Any]:
    """NaN as None, so that it compares."""
    return [None if math.isnan(x) else x for x in tensor.tolist()]


# What is asked


def test_a_call_has_every_column_of_the_data_also_one_that_none_of_its_samples_has():
    task, reward = Known({"a": 1.0}), Asked([1.0])
    task.split = lambda _: [Example("a", "a", {"answer": 1}), Example("b", "b", {"goal": 2})]
    Scorer(task, reward, NOTHING)([episode([0], "a", answer=1)])
    assert reward.arguments[-1] == {"answer": [1], "goal": [None]}
    assert task.columns == reward.arguments[-1]


# Where a reward lands


def test_a_number_lands_on_the_last_policy_token():
    assert place(2.5, episode(TWO_TURNS)) == [0, 0, 0, 0, 0, 0, 2.5]
    assert place(2.5, episode([0, 0, -1])) == [0, 2.5, 0]  # not on what the environment said last


def test_a_list_with_one_entry_a_turn_lands_on_the_last_token_of_each_turn():
    assert place([1.0, -2.0], episode(TWO_TURNS)) == [0, 1, 0, 0, 0, 0, -2]


def test_a_list_with_one_entry_a_token_lands_where_it_says():
    rewards = [0.1, 0.2, 0.0, 0.0, 0.3, 0.4, 0.5]
    assert place(rewards, episode(TWO_TURNS)) == rewards


@pytest.mark.parametrize("missing", [None, math.nan, [1.0, None], [math.nan, 1.0], [0.0] * 6 + [None]])
def test_one_missing_entry_leaves_the_whole_return_unknown(missing):
    assert place(missing, episode(TWO_TURNS)) is None


@pytest.mark.parametrize("wrong", [[], [1.0], [1.0] * 3, [1.0] * 8])
def test_a_list_of_another_length_is_a_fault_that_names_all_three_numbers(wrong):
    assert place(wrong, episode(TWO_TURNS)) == (
        "wrong_length",
        f"a list of {len(wrong)} rewards fits neither the 2 turns nor the 7 tokens of the response",
    )


@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_a_reward_at_a_token_of_the_environment_is_a_fault(reward):
    kind, message = place([0, 0, reward, 0, 0, 0, 0], episode(TWO_TURNS))
    assert (kind, "token of the environment" in message) == ("wrong_length", True)


@pytest.mark.parametrize("endless", [math.inf, -1e39, [2e38, 2e38]])
def test_what_is_infinite_in_float32_by_itself_or_in_sum_is_a_fault_of_its_kind(endless):
    # The largest float32 is 3.4e38.
    kind, message = place(endless, episode(TWO_TURNS))
    assert (kind, "must be finite" in message) == ("non_finite", True)
    assert place(3e38, episode([0])) == [3e38]


def test_the_total_of_a_list_is_its_sum_and_unknown_with_one_entry_missing():
    assert total(3.0) == total([1.0, 2.0]) == 3.0
    assert all(math.isnan(total(r)) for r in (None, math.nan, [1.0, None]))


# Fields of a rollout


def test_a_missing_or_faulty_reward_is_marked_missing_and_never_counts_as_zero():
    task = Known({"a": 1.0, "b": 0.0, "c": None, "d": 1.0})
    reward = Asked([0.5, None, 0.25, [1.0, 2.0]], [Fault("exception", 1, "boom")])
    scored = Scorer(task, reward, NOTHING)([episode([0, 0, 0], n) for n in "abcd"])
    assert scored.fields["rewards_BT"].tolist() == [[0, 0, 0.5], [0, 0, 0], [0, 0, 0.25], [0, 0, 0]]
    assert scored.fields["rewarded_B"].tolist() == [True, False, True, False]
    assert tolist(scored.fields["observed_B"]) == [0.5, None, 0.25, None]
    assert tolist(scored.fields["true_B"]) == [1.0, 0.0, None, 1.0]
    assert [(f.kind, f.index) for f in scored.faults] == [("exception", 1), ("wrong_length", 3)]


def test_rewards_of_short_responses_are_padded_and_a_zero_reward_is_no_missing_one():
    scored = Scorer(Known({"a": 0.0, "b": 1.0}), None, NOTHING)([episode([0], "a"), episode([0, 0, 0], "b")])
    assert scored.fields["rewards_BT"].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert scored.fields["rewarded_B"].tolist() == [True, True]
    assert scored.fields["observed_B"].tolist() == [0, 1]
    assert scored.faults == []


def test_noise_changes_what_is_observed_and_never_the_truth():
    episodes = [episode([0], "a"), episode([0], "b")]
    scored = Scorer(Known({"a": 1.0, "b": None}), None, ALL_WRONG)(episodes)
    assert tolist(scored.fields["observed_B"]) == [0.0, None]  # a missing reward stays missing
    assert tolist(scored.fields["true_B"]) == [1.0, None]
    with_function = Scorer(Known({"a": 1.0, "b": 0.0}), Asked([0.0, 0.0]), ALL_WRONG)(episodes)
    assert with_function.fields["observed_B"].tolist() == [1.0, 1.0]
    assert with_function.fields["true_B"].tolist() == [1.0, 0.0]


def test_noise_is_keyed_by_prompt_visit_and_sample_and_so_blind_to_the_order():
    episodes = [episode([0], str(i)) for i in range(60)]
    half = make_noise(NoiseConfig(kind="flip", rate=0.5), seed=0)
    scorer = Scorer(Known({str(i): 1.0 for i in range(60)}), None, half)
    forward_B, backward_B = scorer(episodes).fields["observed_B"], scorer(episodes[::-1]).fields["observed_B"]
    assert torch.equal(forward_B, backward_B.flip(0))
    assert 15 < forward_B.sum() < 45
    for key in ("visit", "sample"):  # the same answer to one prompt, but for this: no longer the same noise
        again = [replace(episode([0], "0"), **{key: i}) for i in range(60)]
        assert 15 < scorer(again).fields["observed_B"].sum() < 45


# Turns of an environment


def test_what_the_environment_gave_stands_at_its_turns_and_the_verdict_joins_the_last():
    task = Known({"a": 1.0, "b": None, "c": math.nan})
    given = {"a": [0.5, None], "b": [0.5, 2.0], "c": [0.5, 0.0]}
    scored = Scorer(task, None, NOTHING)([episode([0, -1, 1], n, turn_rewards=r) for n, r in given.items()])
    # b: the task has no opinion of its own, the environment's stands; c: the task's verdict is missing.
    assert scored.fields["rewards_BT"].tolist() == [[0.5, 0, 1], [0.5, 0, 2], [0, 0, 0]]
    assert tolist(scored.fields["true_B"]) == [1.5, 2.5, None]
    assert scored.fields["rewarded_B"].tolist() == [True, True, False]


# Who is asked


def test_the_reward_function_gets_prompts_completions_tokens_and_columns():
    chat = [{"role": "user", "content": "hi"}]
    talk = episode([0, 0], "b")
    talk.example = Example("b", chat, {"level": 3})
    reward = Asked([1.0, 1.0])
    Scorer(Known({}), reward, NOTHING)([episode([0], "a", answer="4"), talk])
    prompts, completions, completion_ids, columns = reward.arguments
    assert prompts == ["prompt of a", chat]
    assert completions == ["a", [{"role": "assistant", "content": "b"}]]  # messages for a message prompt
    assert completion_ids == [[0], [0, 1]]
    assert columns == {"answer": ["4", None], "level": [None, 3]}


def test_an_evaluation_asks_the_reward_function_only_for_a_task_that_says_it_knows_no_truth():
    reward, both = Asked([7.0, 8.0]), [episode([0], "a"), episode([0], "b")]
    judge = Scorer(Known({"a": 1.0}), reward, ALL_WRONG).judge
    assert judge(both).rewards == [1.0, None]
    # Nor where all of a call's truth is missing: a process may hold such a share of a split.
    assert judge(both[1:]).rewards == [None]
    assert reward.arguments == ()
    assert Scorer(Known({}, knows_truth=False), reward, ALL_WRONG).judge(both).rewards == [7.0, 8.0]
    assert Scorer(Known({}, knows_truth=False), None, ALL_WRONG).judge([episode([0], "a")]).rewards == [None]
    # A mix may know it of some of its tasks.
    faulty = Asked([None], [Fault("timeout", 0, "late")])
    judged = Scorer(Known({"b": 1.0}, knows_truth=False), faulty, ALL_WRONG).judge([*both[1:], both[0], both[1]])
    assert judged.rewards == [1.0, None, 1.0]
    assert faulty.arguments[0] == ["prompt of a"]
    assert [fault.index for fault in judged.faults] == [1]


@pytest.mark.parametrize(("reward", "kind"), [([], "wrong_length"), ([1.0] * 3, "wrong_length"), (1e39, "non_finite")])
def test_what_training_cannot_place_is_unknown_to_an_evaluation_too_with_its_fault(reward, kind):
    nothing_known = Known({}, knows_truth=False)
    for scorer in (Scorer(Known({"a": reward}), None, NOTHING), Scorer(nothing_known, Asked([reward]), NOTHING)):
        judged = scorer.judge([episode([0, 0], "a")])
        assert judged.rewards == [None]
        assert [(fault.kind, fault.index) for fault in judged.faults] == [(kind, 0)]
    scored = Scorer(Known({"a": reward}), None, NOTHING)([episode([0, 0], "a")])
    assert [fault.kind for fault in scored.faults] == [kind]
    assert scored.fields["true_B"].isnan().all()


def test_a_run_without_anyone_who_knows_a_reward_and_one_without_prompts_do_not_start():
    task = Known({"a": 1.0})
    assert open_reward(load_config(), task) is None
    task.knows_truth = False
    with pytest.raises(InputError, match=r"reward.function = task.*cannot judge"):
        open_reward(load_config(), task)
    with pytest.raises(InputError, match="training split is empty"):
        open_reward(load_config(), Known({}))


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        # 32 evaluation prompts 3 times: 96 samples in 6 calls as large as a step's. Of each the batch, ten limits for
        # samples alone, and one that was begun just before.
        ((), 6 * 12 * 600),
        (("retries=2",), 6 * 14 * 600),  # that one three times
        # 16 samples, 12 at a time in 2 rounds and half a limit more; and all again
        (("concurrency=12", "retries=1"), 6 * 2 * 2.5 * 600),
        (("mix=[{function: task, weight: 1}, {function: 'm:f', weight: 2}]",), 2 * 6 * 12 * 600),
        # an async part needs 2 * 2.5 limits, one that is not 1 + 10 + 2
        (("concurrency=12", "retries=1", "mix=[{function: 'm:f'}, {function: 'm:g'}]"), 2 * 6 * 13 * 600),
    ],
)
def test_a_process_that_waits_for_another_waits_as_long_as_its_rewards_may_take(settings, seconds):
    usual = ["sampling.prompts_per_step=4", "sampling.samples_per_prompt=4", "evaluation.prompts=32"]
    config = load_config(
        None, [*usual, "evaluation.samples=3", "reward.timeout=600", *(f"reward.{setting}" for setting in settings)]
    )
    assert longest_scoring(config) == seconds


def test_lots_that_are_joined_and_selected_are_what_they_would_have_been_in_one() -> None:
    task = Known({"a": 1.0, "b": 0.5, "c": None})
    episodes = [episode([0, 0], "a", answer=1), episode(TWO_TURNS, "b"), episode([0], "c", hint="h")]
    scorer = Scorer(task, None, NOTHING)
    whole, joined = scorer(episodes), join([scorer(episodes[:1]), scorer(episodes[1:])])
    for name, values in whole.fields.items():
        torch.testing.assert_close(joined.fields[name], values, rtol=0, atol=0, equal_nan=True)
    assert joined.believed == {"answer": [1, None, None], "hint": [None, None, "h"]} == whole.believed
    turned = joined.select([2, 0])
    assert turned.believed == {"answer": [None, 1], "hint": ["h", None]}
    assert turned.fields["true_B"].isnan().tolist() == [True, False]
    assert turned.fields["rewards_BT"].tolist() == [[0.0] * 7, [0.0, 1.0] + [0.0] * 5]


def test_a_fault_keeps_its_sample_when_lots_are_joined() -> None:
    def lot(*faults: Fault) -> Scored:
        return Scored({"rewards_BT": torch.zeros(2, 1), "rewarded_B": torch.zeros(2)}, list(faults), {})

    joined = join([lot(Fault("exception", 1, "x")), lot(Fault("timeout", None, "y"), Fault("exception", 0, "z"))])
    assert [(f.index, f.message) for f in joined.faults] == [(1, "x"), (None, "y"), (2, "z")]
