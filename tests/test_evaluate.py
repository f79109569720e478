"""Evaluation: the summary of a rigged sampler by hand, and draws that are keyed by the item."""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

from dvpo import evaluate as evaluate_module
from dvpo import trained as trained_module
from dvpo.errors import InputError
from dvpo.evaluate import Evaluation, Judge, evaluate, evaluate_checkpoint, fitting_examples, interval_text
from dvpo.faults import lost_in_evaluation
from dvpo.rewards import Fault, Scores
from dvpo.sampling import Episode, Turn
from dvpo.settings import SamplingConfig
from dvpo.tasks import Example, Reward, SingleTurn
from dvpo.trainer import Trainer
from runs import Guessing, Parity, run_config
from tiny_models import END_ID, AsciiPolicy, tiny_policy

ITEMS = [Example(f"item {i}", "q" * (i + 1)) for i in range(5)]
RIGHT, WRONG = 200, 100


class Task:
    """Only the environment is asked for."""

    def environment(self, example: Example) -> SingleTurn:
        return SingleTurn(example)


class RiggedSampler:
    """Answers item i by the letters of a script: the first is the greedy answer, the others are the draws.

    r: right, w: wrong, t: wrong and cut by the length limit, x: an answer of which nothing is known.
    """

    SCRIPT = ("rrww", "rrrr", "wwww", "twrw", "rxrr")
    CODES = {"r": RIGHT, "w": WRONG, "t": WRONG, "x": 50}  # noqa: RUF012

    def __init__(self, policy: Any, settings: SamplingConfig, greedy: bool) -> None:
        self.greedy = greedy

    def sample(self, contexts: Sequence[Sequence[int]], budgets: Sequence[int], seeds: Sequence[int]) -> list[Turn]:
        scripts = [text[:1] if self.greedy else text[1:] for text in self.SCRIPT]
        letters = "".join(scripts)
        assert len(contexts) == len(letters)
        # Rows come item by item, and each item's prompt is as long as its number says.
        assert [len(c) - 1 for c in contexts] == [i for i, script in enumerate(scripts) for _ in script]
        return [Turn([self.CODES[x], END_ID], [0.0, 0.0], finished=x != "t") for x in letters]


def judge(episodes: Sequence[Episode]) -> Scores:
    rewards: list[Reward] = [{RIGHT: 1.0, WRONG: 0.25}.get(e.tokens[0]) for e in episodes]
    return Scores(rewards, [Fault("exception", i, "KeyError") for i, r in enumerate(rewards) if r is None])


def all_of(reward: Reward) -> Judge:
    return lambda episodes: Scores([reward] * len(episodes), [])


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.setattr(evaluate_module, "HuggingFaceSampler", RiggedSampler)
    return evaluate(tiny_policy(), Task(), ITEMS, judge, SamplingConfig(), samples=3, seed=0)


def test_the_greedy_summary_by_hand(rigged):
    # r r w t r: three of five solved; reward (3 + 2 * .25) / 5; one of five cut.
    low, high = binomtest(3, 5).proportion_ci(method="wilson")
    expected = {
        "items": 5,
        "unknown": 0,
        "accuracy": 0.6,
        "reward": 0.7,
        "truncated": 0.2,
        "accuracy_low": low,
        "accuracy_high": high,
    }
    assert {name: rigged.summary[name] for name in expected} == pytest.approx(expected)


def test_mean_and_pass_at_k_by_hand_leave_out_an_item_with_an_unknown_draw(rigged):
    # Draws rww, rrr, www, wrw; the fifth item has an unknown one: mean (1/3 + 1 + 0 + 1/3) / 4, pass 3 of 4.
    assert rigged.summary["mean@3"] == pytest.approx(5 / 12)
    assert rigged.summary["pass@3"] == 0.75
    for name in ("mean@3", "pass@3"):
        assert 0 <= rigged.summary[name + "_low"] < rigged.summary[name] < rigged.summary[name + "_high"] <= 1


def test_pass_hat_k_is_the_share_of_items_that_every_draw_solves(rigged):
    assert rigged.summary["pass^3"] == 0.25  # rww, rrr, www, wrw


class TaskWithFigures(Task):
    """Its environments say how long their prompt is."""

    def environment(self, example: Example) -> SingleTurn:
        environment = super().environment(example)
        environment.figures = lambda: {"length": len(example.prompt)}
        return environment


def test_what_environments_know_of_their_episode_is_averaged_over_the_greedy_ones_and_kept_by_item(monkeypatch):
    monkeypatch.setattr(evaluate_module, "HuggingFaceSampler", RiggedSampler)
    result = evaluate(tiny_policy(), TaskWithFigures(), ITEMS, judge, SamplingConfig(), samples=3, seed=0)
    assert [row["length"] for row in result.rows] == [1, 2, 3, 4, 5]
    assert result.summary["length"] == 3
    assert 1 <= result.summary["length_low"] < 3 < result.summary["length_high"] <= 5


class TaskThatGives(Task):
    def __init__(self, *given: Any) -> None:
        self.given = given

    def environment(self, example: Example) -> SingleTurn:
        environment = super().environment(example)
        environment.figures = lambda: self.given[ITEMS.index(example) % len(self.given)]
        return environment


def figures_of(monkeypatch: pytest.MonkeyPatch, *given: Any) -> Evaluation:
    monkeypatch.setattr(evaluate_module, "HuggingFaceSampler", RiggedSampler)
    return evaluate(tiny_policy(), TaskThatGives(*given), ITEMS, judge, SamplingConfig(), samples=3, seed=0)


def test_a_figure_that_some_episodes_lack_is_averaged_over_the_others(monkeypatch):
    # The five items give 1, None, NaN, {}, 3 and, late, a name of their own.
    result = figures_of(monkeypatch, {"x": np.int64(1)}, {"x": None}, {"x": math.nan}, {}, {"x": 3, "late": True})
    assert (result.summary["x"], result.summary["late"]) == (2, 1)
    assert ["x" in row for row in result.rows] == [True, False, False, False, True]


@pytest.mark.parametrize("name", ["accuracy", "reward", "items", "id", "mean@3", "length_low", "a/b"])
def test_a_figure_with_a_name_of_ours_is_refused(monkeypatch, name):
    with pytest.raises(InputError, match=rf"of prompt item 0 names '{re.escape(name)}', as evaluations .*: rename it"):
        figures_of(monkeypatch, {name: 1.0})


@pytest.mark.parametrize("value", ["many", [1.0], {}])
def test_a_figure_that_is_no_number_is_refused(monkeypatch, value):
    with pytest.raises(
        InputError, match=r"figures\(\) of the environment of prompt item 0 gives x = .*: give a number"
    ):
        figures_of(monkeypatch, {"x": value})


class Diary(Parity):
    """Prompts with a time, as chats in parquet have; figures of three kinds; one of two held-out answers unknown."""

    def split(self, name: str) -> list[Example]:
        at = {"at": datetime(2026, 1, 2)}
        return [replace(e, prompt=[{**message, **at} for message in e.prompt]) for e in super().split(name)]

    def environment(self, example: Example) -> SingleTurn:
        environment = SingleTurn(example)
        environment.figures = lambda: {"words": np.int64(300), "share": 0.5}
        return environment


def make_task(settings: Any) -> Diary:
    return Diary([None])


def test_the_first_examples_of_a_split_are_the_ones_that_count(tmp_path):
    config = run_config(tmp_path, "evaluation.prompts=3")
    chosen = fitting_examples(Parity(), "train", config, tiny_policy())
    assert chosen == list(Parity().split("train"))[:3]


def test_the_policy_is_that_of_the_newest_checkpoint_or_of_the_one_named(tmp_path, monkeypatch):
    opened, open_policy = [], trained_module.open_policy

    def opening(source, *given, **named):
        opened.append(source)
        return open_policy(source, *given, **named)

    monkeypatch.setattr(trained_module, "open_policy", opening)
    config = run_config(tmp_path, "task.name=test_evaluate:make_task", "checkpoint.every=1", "evaluation.every=0")
    Trainer(config).train()
    files = [evaluate_checkpoint(source, [], ["id"], 0, None) for source in (tmp_path, tmp_path / "checkpoint-1")]
    assert opened == [tmp_path / f"checkpoint-{step}" / "policy" for step in (2, 1)]
    assert [file.name for file in files] == ["evaluation-2.jsonl", "evaluation-1.jsonl"]


def test_a_checkpoints_table_has_shares_in_per_cent_and_its_rows_hold_whatever_prompts_do(tmp_path, capsys):
    config = run_config(tmp_path, "task.name=test_evaluate:make_task", "steps=1")
    Trainer(config).train()
    file = evaluate_checkpoint(tmp_path, [], ["id"], 0, None)
    assert [json.loads(line)["prompt"][0]["at"] for line in file.read_text().splitlines()] == [
        "2026-01-02 00:00:00"
    ] * 2
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│"))
    assert "1 known of 2 " in line  # the greedy answers that accuracy is over
    assert "300 [300, 300]" in line
    assert "50.0 [50, 50]" in line


def test_the_table_has_the_greedy_answers_that_were_cut_and_of_how_many_items_these_are(rigged):
    out = io.StringIO()
    Console(file=out, width=160).print(evaluate_module._table({"id": rigged}, {"id": 40}, ""))
    head, line = (line for line in out.getvalue().splitlines() if line[0] in "┃│")
    assert head.split("┃")[-2].strip() == "cut"
    assert line.split("│")[-2].strip() == "20.0"  # one of five
    assert line.split("│")[2].strip() == "5 of 40"


def test_a_task_or_reward_that_was_given_in_python_is_not_replaced_by_the_configs(tmp_path, monkeypatch):
    Trainer(run_config(tmp_path / "task", "steps=1"), task=Parity()).train()
    with pytest.raises(InputError, match=r"was given its task in Python, and its config says task.name = math: set"):
        evaluate_checkpoint(tmp_path / "task", [], None, 0, None)
    assert evaluate_checkpoint(tmp_path / "task", ["task.name=test_evaluate:make_task"], None, 0, None).exists()

    (tmp_path / "my.jsonl").write_text("".join(f'{{"prompt": "{i}+{i}="}}\n' for i in range(9)))
    unknown = ["task.name=files", f"task.path={tmp_path / 'my.jsonl'}", "reward.function=my:reward"]
    Trainer(
        run_config(tmp_path / "reward", "steps=1", *unknown), reward=lambda completions, **_: [1.0] * len(completions)
    ).train()
    with pytest.raises(
        InputError, match=r"given its reward in Python, and its config says reward.function = my:reward"
    ):
        evaluate_checkpoint(tmp_path / "reward", [], None, 0, None)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_the_interval_of_pass_at_k_is_wilsons_and_no_point_where_none_or_all_succeed(monkeypatch, reward):
    # None of 5: Wilson's interval is [0, z^2 / (n + z^2)] = [0, 3.8415 / 8.8415]; a bootstrap would say [0, 0].
    monkeypatch.setattr(evaluate_module, "HuggingFaceSampler", RiggedSampler)
    given = evaluate(tiny_policy(), Task(), ITEMS, all_of(reward), SamplingConfig(), samples=3, seed=0)
    for name in ("pass@3", "pass^3"):
        low, high = given.summary[f"{name}_low"], given.summary[f"{name}_high"]
        assert given.summary[name] == reward
        assert sorted([abs(reward - low), abs(reward - high)]) == pytest.approx([0, 0.43448], abs=1e-5)


def test_rows_hold_each_items_own_answers_and_rewards(rigged):
    assert [row["id"] for row in rigged.rows] == [item.id for item in ITEMS]
    assert [row["reward"] for row in rigged.rows] == [1.0, 1.0, 0.25, 0.25, 1.0]
    assert [row["truncated"] for row in rigged.rows] == [False, False, False, True, False]
    assert [row["samples"] for row in rigged.rows] == [
        [1.0, 0.25, 0.25], [1.0, 1.0, 1.0], [0.25, 0.25, 0.25], [0.25, 1.0, 0.25], [None, 1.0, 1.0]
    ]  # fmt: skip


class Twice(Task):
    """Asks once more."""

    def environment(self, example: Example) -> Guessing:
        return Guessing(example)


class Always:
    """Answers every turn alike."""

    def sample(self, contexts: Sequence[Sequence[int]], budgets: Sequence[int], seeds: Sequence[int]) -> list[Turn]:
        return [Turn([65, END_ID], [0.0, 0.0], finished=True) for _ in contexts]


def test_a_row_of_several_turns_holds_what_the_environment_said_as_well(rigged):
    two = evaluate(tiny_policy(), Twice(), ITEMS[:1], all_of(1.0), SamplingConfig(), 0, 0, lambda greedy: Always())
    (row,) = two.rows
    word, again = row["completion"].split("\n")
    assert word == again
    assert row["messages"] == [
        {"role": role, "content": text} for role, text in (("assistant", word), ("user", "?!"), ("assistant", word))
    ]
    assert "messages" not in rigged.rows[0]


def test_a_fault_of_the_reward_is_kept_with_its_sample(rigged):
    (fault,) = rigged.faults  # the first draw of the last item
    assert (fault["kind"], fault["prompt_id"], fault["sample"]) == ("exception", ITEMS[-1].id, 0)
    assert lost_in_evaluation(rigged.faults) == (
        "the reward failed once, and what it failed on counts in no figure; the first: KeyError"
    )
    assert lost_in_evaluation([{**fault, "cured": True}]) == ""


def test_unknown_rewards_count_in_no_figure(monkeypatch):
    monkeypatch.setattr(evaluate_module, "HuggingFaceSampler", RiggedSampler)
    nothing = evaluate(tiny_policy(), Task(), ITEMS, all_of(None), SamplingConfig(), samples=3, seed=0)
    assert nothing.summary["items"] == 0
    assert math.isnan(nothing.summary["accuracy"])
    assert "mean@3" not in nothing.summary
    assert nothing.rows[0]["reward"] is None


@pytest.mark.parametrize(("reward", "solved"), [(0.99, 0), (1 - 2**-24, 1)])  # the latter is a rounded float32
def test_nearly_the_whole_reward_is_no_solution(monkeypatch, reward, solved):
    monkeypatch.setattr(evaluate_module, "HuggingFaceSampler", RiggedSampler)
    summary = evaluate(tiny_policy(), Task(), ITEMS, all_of(reward), SamplingConfig(), samples=3, seed=0).summary
    assert [summary[name] for name in ("accuracy", "mean@3", "pass@3", "pass^3")] == [solved] * 4


def test_an_item_without_a_reward_still_counts_among_the_cut_and_in_its_environments_figures(monkeypatch):
    def knows_what_is_right(episodes: Sequence[Episode]) -> Scores:
        return Scores([1.0 if e.tokens[0] == RIGHT else None for e in episodes], [])

    monkeypatch.setattr(evaluate_module, "HuggingFaceSampler", RiggedSampler)
    summary = evaluate(
        tiny_policy(), TaskWithFigures(), ITEMS, knows_what_is_right, SamplingConfig(), samples=3, seed=0
    ).summary
    # Greedy answers r r w t r: items 1, 2 and 5 are known, all right. One of the five is cut, and it is not known.
    assert (summary["items"], summary["unknown"], summary["accuracy"], summary["reward"]) == (3, 2, 1, 1)
    assert summary["truncated"] == 0.2
    assert summary["length"] == 3  # (1 + 2 + 3 + 4 + 5) / 5; of the known ones 8/3


def answers(
    policy: AsciiPolicy, items: Sequence[Example], samples: int = 2, seed: int = 0, **settings: Any
) -> list[Any]:
    """Tokens of the greedy answer and of the draws, by item."""
    seen: dict[str, list[list[int]]] = {item.id: [] for item in items}

    def remember(episodes: Sequence[Episode]) -> Scores:
        for e in episodes:
            seen[e.example.id].append(e.tokens)
        return Scores([1.0] * len(episodes), [])

    chosen = SamplingConfig(**{"max_completion_length": 12, **settings})
    result = evaluate(policy, Task(), items, remember, chosen, samples, seed)
    assert [row["completion"] for row in result.rows] == [
        policy.tokenizer.decode(seen[item.id][0], skip_special_tokens=True) for item in items
    ]
    return list(seen.values())


def test_answers_are_keyed_by_seed_and_item_and_not_by_what_is_evaluated_beside_it():
    policy = tiny_policy(kind=AsciiPolicy)
    everything = answers(policy, ITEMS)
    assert answers(policy, ITEMS) == everything
    assert answers(policy, ITEMS[::-1][:3], batch_size=2) == everything[::-1][:3]
    longer = answers(policy, ITEMS, samples=4)
    assert [item[:3] for item in longer] == everything  # more draws keep the first ones
    other = answers(policy, ITEMS, seed=1)
    assert [item[0] for item in other] == [item[0] for item in everything]  # greedy has no seed
    assert all(new[1:] != old[1:] for new, old in zip(other, everything, strict=True))
    assert all(greedy != one != two for greedy, one, two in everything)


def test_an_overlong_prompt_keeps_its_last_tokens_and_leaves_room_for_the_answer():
    policy = tiny_policy("gpt2", kind=AsciiPolicy)  # 64 positions
    long, short = Example("a", "xy" * 50 + "z" * 52), Example("a", "z" * 52)
    # The prompt may have 60 tokens, but 12 more have to fit behind it: 52 are left.
    assert answers(policy, [long], max_prompt_length=60) == answers(policy, [short], max_prompt_length=60)
    assert answers(policy, [long], max_prompt_length=5) == answers(policy, [Example("a", "z" * 5)])


def test_intervals_are_printed_in_per_cent_and_what_is_not_known_as_a_dash():
    figures = {"x": 0.453, "x_low": 0.386, "x_high": 0.514, "y": math.nan}
    assert interval_text(figures, "x") == "45.3 [39, 51]"
    assert interval_text(figures, "x", percent=False) == "0.453 [0.386, 0.514]"
    assert interval_text(figures, "y") == interval_text(figures, "z") == "-"
