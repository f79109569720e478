"""`dvpo inspect`: any response under a checkpoint's critic, in the terminal and as a page."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dvpo import Trainer
from dvpo.cli import main
from dvpo.errors import InputError
from dvpo.inspection import Question, answered, find_example, inspect_checkpoint, look, open_subject
from dvpo.settings import RatesConfig
from dvpo.settings_learning import KLConfig
from dvpo.tasks import Example, SingleTurn, Step
from dvpo.token_terminal import LISTED, print_view
from runs import Parity, run_config

PROMPT = "2+3="


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of dvpo, one of ppo, one of grpo."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("dvpo", "ppo", "grpo"):
        Trainer(run_config(folder / name, f"algorithm={name}", "steps=1")).train()
    return folder


def shown(source: Path, question: Question, colour: str = "advantages", **further: Any) -> str:
    out = StringIO()
    console = Console(file=out, width=140, force_terminal=True, color_system="truecolor")
    inspect_checkpoint(str(source), question, colour, further.get("compare"), further.get("html"), console)
    return out.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_the_values_are_those_that_the_trainer_logs(runs: Path):
    # What a step recorded at its policy's and critic's start is what inspecting that start says of the same response.
    config = run_config(runs / "again", "steps=2", "policy_optimiser.lr=0", "critic_optimiser.lr=0", "log.tokens=1")
    Trainer(config).train()
    subject = open_subject(str(runs / "again"))
    recorded = json.loads((runs / "again" / "tokens.jsonl").read_text().splitlines()[0])
    (place,) = [i for i, e in enumerate(subject.task.split("train")) if e.id == recorded["prompt_id"]]
    question = Question(split="train", row=place, response="x")
    example = find_example(subject, question)
    episode = answered(subject, example, question)
    first = Trainer(replace(config, output=str(runs / "fresh")))  # draws the same responses
    first.step = 1
    episode.tokens = first.collector.sample(first.prompts.next(1))[0].tokens
    first.close()
    episode.turns, episode.logprobs = [0] * len(episode.tokens), [0.0] * len(episode.tokens)
    row = look(subject, example, episode, question).tokens[0]
    for name in ("value", "width", "lower", "upper"):
        torch.testing.assert_close(torch.tensor(row[name]), torch.tensor(recorded[name]), atol=2e-3, rtol=2e-3)


def test_a_given_response_is_shown_token_by_token_with_its_figures(runs: Path):
    text = shown(runs / "dvpo", Question(prompt=PROMPT, response="2+3=5", reward=1.0))
    assert "\x1b[30;48;2;" in text  # black on a colour
    assert "policy  2+3=5" in plain(text)
    assert "advantage" in plain(text)
    assert len(re.findall(r"│ [▁▂▃▄▅▆▇█]{8} │", plain(text))) == 5


def test_without_a_reward_there_is_no_advantage(runs: Path):
    text = plain(shown(runs / "dvpo", Question(prompt=PROMPT, response="5")))
    table, why = text.split("no advantages: ")
    assert "advantage" not in table
    assert why.strip() == "the response has no reward"
    assert "colour: value" in table


def looked(runs: Path, question: Question, cut: bool = False, **changes: dict[str, Any]) -> dict[str, Any]:
    """The tokens' record under a critic whose values are about .7, in a run of other settings."""
    subject = open_subject(str(runs / "ppo"))
    assert subject.critic is not None
    subject.critic.heads.linear.bias.data.fill_(0.7)
    sections = {name: replace(getattr(subject.config, name), **fields) for name, fields in changes.items()}
    subject = replace(subject, config=replace(subject.config, **sections))
    example = find_example(subject, question)
    episode = answered(subject, example, question)
    episode.terminated = not cut
    return look(subject, example, episode, question).tokens[0]


RATES = RatesConfig(false_positive=0.1, false_negative=0.3)


@pytest.mark.parametrize(
    ("reward", "learnt"),
    [
        ({}, 1.0),
        ({"rates": RATES, "correction": "backward"}, 1.5),  # (1 - .1) / (1 - .1 - .3)
        ({"rates": RATES, "correction": "forward"}, 0.3),  # 1 - (1 - .3)
        ({"overlong": 12}, 0.5),  # 6 of the 12 tokens that cost
        ({"overlong": 12, "clip": 0.25}, 0.25),
    ],
)
def test_an_advantage_is_of_the_reward_that_the_critic_learnt_from(runs: Path, reward: dict[str, Any], learnt: float):
    # With lambda = 1 it is the return less the value.
    row = looked(runs, Question(prompt=PROMPT, response="2+3=55", reward=1.0), reward=reward, advantage={"lam": 1.0})
    assert len(row["tokens"]) == 6
    for advantage, value in zip(row["advantages"], row["value"], strict=True):
        assert advantage + value == pytest.approx(learnt, abs=1e-3)


def test_what_follows_a_cut_is_worth_what_the_critic_says(runs: Path):
    # With lambda = 1 it is added to every advantage: the value that one more token, whichever, is read behind.
    after = looked(runs, Question(prompt=PROMPT, response="2+3=5", reward=1.0))["value"][-1]

    def of(truncation: str) -> dict[str, Any]:
        question = Question(prompt=PROMPT, response="2+3=", reward=1.0)
        return looked(runs, question, cut=True, advantage={"lam": 1.0, "truncation": truncation})

    for worth_0, worth_more in zip(of("terminal")["advantages"], of("bootstrap")["advantages"], strict=True):
        assert worth_more - worth_0 == pytest.approx(after, abs=1e-3)
    assert "leaves the step" in of("mask")["unweighed"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"reward": {"norm": "group"}}, "reward.norm = group takes the returns of other responses"),
        ({"reward": {"trusted": 0.5, "correction": "backward"}}, "are estimated in the run (reward.trusted)"),
        ({"actor": {"kl": KLConfig(coef=0.1, place="reward")}}, "takes the starting policy"),
        ({"advantage": {"recentre": True}}, "the values are recentred (advantage.recentre) by the responses of a step"),
    ],
)
def test_where_the_critic_learnt_from_more_than_one_response_there_are_no_advantages(
    runs: Path, changes: dict[str, dict[str, Any]], why: str
):
    row = looked(runs, Question(prompt=PROMPT, response="5", reward=1.0), **changes)
    assert "advantages" not in row
    assert why in row["unweighed"]
    assert row["value"]


def test_an_example_of_the_task_is_sampled_and_judged(runs: Path):
    text = plain(shown(runs / "dvpo", Question(split="ood", row=1, seed=3), "width"))
    assert "colour: width" in text
    assert re.search(r"true [01],", text)
    assert text == plain(shown(runs / "dvpo", Question(split="ood", row=1, seed=3), "width"))


def test_a_given_response_is_paid_by_the_environment_and_read_behind_the_prompt_that_it_gave(runs: Path):
    class Paying(SingleTurn):
        def reset(self) -> list[dict[str, str]]:
            return [{"role": "user", "content": "another prompt"}]

        def step(self, text: str) -> Step:
            return Step((), reward=0.25, done=True)

    class Task(Parity):
        def environment(self, example: Example) -> SingleTurn:
            return Paying(example)

        def true_reward(self, prompts: Any, *rest: Any, **columns: Any) -> list[None]:
            return [None] * len(prompts)

    subject = replace(open_subject(str(runs / "dvpo")), task=Task())
    question = Question(split="train", row=0, response="x")
    example = find_example(subject, question)
    episode = answered(subject, example, question)
    assert episode.prompt_tokens == subject.encoder.prompt(Paying(example).reset())
    assert episode.turn_rewards == [0.25]
    row = look(subject, example, episode, question).tokens[0]
    assert row["observed"] == 0.25


def test_two_critics_read_the_same_response(runs: Path):
    text = plain(shown(runs / "dvpo", Question(row=0), compare=str(runs / "ppo")))
    policies = re.findall(r"^policy  (.*)$", text, re.MULTILINE)
    assert len(policies) == 2
    assert policies[0] == policies[1]
    assert "ppo, checkpoint 1" in text


def test_a_run_without_a_critic_shows_its_words(runs: Path):
    assert "policy  5" in plain(shown(runs / "grpo", Question(prompt=PROMPT, response="5", reward=1.0)))


def test_the_page_holds_both_views(runs: Path, tmp_path: Path):
    page = tmp_path / "view.html"
    arguments = ["inspect", str(runs / "dvpo"), "--prompt", PROMPT, "--response", "</script>5", "--html", str(page)]
    assert main([*arguments, "--compare", str(runs / "ppo")]) == 0
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert len(json.loads(data)["views"]) == 2
    assert "".join(json.loads(data)["views"][0]["tokens"]) == "</script>5"


def test_what_a_response_contains_does_not_reach_the_terminal(runs: Path):
    out = shown(runs / "dvpo", Question(prompt="\x1b[2J[bold]", response="\x1b[2Jx"))
    assert "\x1b[2J" not in out
    assert "␛[2J[bold]" in plain(out)


def test_of_a_long_response_the_table_lists_the_strongest_tokens():
    count = LISTED + 10
    row = {"prompt": "p", "tokens": ["t"] * count, "turns": [0] * count, "value": [float(i) for i in range(count)],
           "quantiles": [[[0.0]]] * count, "observed": None, "true": None}  # fmt: skip
    out = StringIO()
    print_view(Console(file=out, width=100), row, "title", "value")
    numbers = [int(n) for n in re.findall(r"^│ +(\d+) │", out.getvalue(), re.MULTILINE)]
    assert numbers == list(range(11, count + 1))  # counted from 1, in their order


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (Question(row=10**6), "--row = 1000000: split id of task math has"),
        (Question(prompt=PROMPT, response=""), "--response is empty"),
        (Question(prompt=PROMPT, response="1" * 5000), "more than the model's context"),
    ],
)
def test_bad_questions_end_in_one_sentence(runs: Path, question: Question, sentence: str):
    with pytest.raises(InputError, match=re.escape(sentence)):
        shown(runs / "dvpo", question)


def test_examples_of_a_task_that_was_given_in_python_are_not_replaced_by_the_configs(tmp_path: Path):
    Trainer(run_config(tmp_path / "run", "steps=1"), task=Parity()).train()
    with pytest.raises(InputError, match=r"was given its task in Python, and its config says task.name = math: set"):
        shown(tmp_path / "run", Question(row=0))
    assert "policy  5" in plain(shown(tmp_path / "run", Question(prompt=PROMPT, response="5")))


def test_a_folder_without_a_checkpoint_and_a_page_without_its_ending_are_refused(runs: Path, tmp_path: Path):
    with pytest.raises(InputError, match="holds no sound checkpoint"):
        shown(tmp_path, Question(prompt=PROMPT))
    with pytest.raises(InputError, match=r"let it end in \.html"):
        shown(runs / "dvpo", Question(prompt=PROMPT, response="5"), html=str(tmp_path / "x.txt"))
