"""`dvpo diagnose`: injected noise is found on the embedded model's own answers; rewards that scatter, fail, differ."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from dvpo.cli import main
from dvpo.config import Config
from dvpo.diagnose import Effort, diagnose_file, fill_sheet
from dvpo.diagnosis import find
from dvpo.errors import InputError
from dvpo.loading import load_config
from runs import model_folder

ASYMMETRIC = "noise={kind: asymmetric, false_positive: 0.1, false_negative: 0.3}"
SMALL = Effort(prompts=6, samples=3)

REWARDS = """
import random

dice = random.Random(7)  # of its own: 18 answers' deviation by other dice falls outside any narrow bound now and then

def scattered(completions, **columns):
    return [dice.random() for _ in completions]

async def alone(completions, **columns):
    return scattered(completions)

def failing(completions, **columns):
    return [float("inf") if i % 3 == 0 else None if i % 3 == 1 else 1.0 for i, _ in enumerate(completions)]

def length(completions, **columns):
    return [float(len(str(c))) for c in completions]
"""


def embedded(*overrides: str) -> Config:
    return load_config({"sampling": {"max_completion_length": 28}}, ["device=cpu", *overrides])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for prompts whose truth nobody knows, beside a module of rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "diagnosed.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"id": "{i}", "prompt": "{i}+{i}="}}\n' for i in range(12)))
    return ["task.name=files", "task.path=prompts.jsonl", f"model.path={model_folder()}"]


def test_the_command_finds_the_injected_noise_and_its_snippet_is_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("sampling: {max_completion_length: 28}\n")
    words = ["diagnose", "run.yaml", "--prompts", "48", "--json", "found.json", "device=cpu", ASYMMETRIC]
    assert main(words) == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "found.json").read_text())
    findings = written["findings"]
    for name, rate in (("false_positive", 0.1), ("false_negative", 0.3)):
        found = findings[name]
        assert found["seen"] > 100
        assert found["low"] <= rate <= found["high"]
    # Flips of p and q agree with themselves in a share 1 - 2p(1 - p) of the wrong answers, 1 - 2q(1 - q) of the right.
    share = findings["false_negative"]["seen"] / (48 * 8)
    assert findings["repeat_equal"] == pytest.approx(1 - 0.18 * (1 - share) - 0.42 * share, abs=0.06)
    assert findings["silent"] < findings["silent_truth"]  # noise looks like signal
    assert written["settings"]["reward"]["correction"] == "backward"
    assert yaml.safe_load(out.split("\n\n")[1]) == written["settings"]
    load_config(written["settings"])


def test_the_tasks_own_verdict_is_not_held_against_itself():
    sheet = fill_sheet(embedded(), SMALL)
    assert sheet.judged_by_truth
    findings = find(sheet)
    assert (findings.repeat_equal, findings.false_positive) == (1.0, None)
    assert np.array_equal(sheet.observed_RPK[0], sheet.true_PK)


@pytest.mark.parametrize("kind", ["{kind: persistent, rate: 0.5}", "{kind: response_reward_model, accuracy: 0.7}"])
def test_errors_that_repeat_themselves_show_against_the_truth_and_not_in_a_repetition(kind: str):
    sheet = fill_sheet(embedded(f"noise={kind}"), SMALL)
    assert find(sheet).repeat_equal == 1
    assert not np.array_equal(sheet.observed_RPK[0], sheet.true_PK)


def test_answers_depend_on_the_seed_and_not_on_the_prompts_beside_them():
    few, more = (fill_sheet(embedded(), Effort(count, 2, 1)) for count in (3, 6))
    assert np.array_equal(more.lengths_PK[:3], few.lengths_PK)
    other = fill_sheet(embedded("seed=1"), Effort(6, 2, 1))
    assert not np.array_equal(more.lengths_PK, other.lengths_PK)


def test_a_reward_that_scatters_and_one_that_fails_are_told_apart(own: list[str]):
    scattered = find(fill_sheet(embedded(*own, "reward.function=diagnosed:scattered"), SMALL))
    assert scattered.repeat_equal == 0
    assert scattered.repeat_deviation == pytest.approx(12**-0.5, abs=0.12)  # uniform in [0, 1]
    failing = find(fill_sheet(embedded(*own, "reward.function=diagnosed:failing"), SMALL))
    assert (failing.faults, failing.missing) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert failing.fault == "non_finite: returned inf"
    assert failing.silent_truth is None


def test_parts_of_a_mix_and_further_rewards_are_compared(own: list[str]):
    mix = "reward.mix=[{function: 'diagnosed:length'}, {function: 'diagnosed:alone', name: dice}]"
    # For the async part: the other one, and the further one, are called as they are.
    found = find(fill_sheet(embedded(*own, mix, "reward.concurrency=4"), SMALL, ["diagnosed:length"])).agreements
    assert [one.name for one in found] == ["length", "dice", "diagnosed:length"]
    assert found[0].order == found[2].order
    assert found[0].order > 0.9  # the sum goes by the length, beside which a number in [0, 1] is small


@pytest.mark.parametrize(
    ("effort", "output", "words"),
    [
        (Effort(prompts=0), None, "--prompts = 0 is too few: take at least 1"),
        (Effort(samples=1), None, "--samples = 1 is too few: take at least 2"),
        (Effort(repeats=0), None, "--repeats = 0 is too few: take at least 1"),
        (Effort(), "none/found.json", "there is no folder"),
        (Effort(), ".", "--json = . is a folder"),
    ],
)
def test_a_mistake_ends_in_one_sentence(effort: Effort, output: Any, words: str):
    with pytest.raises(InputError, match=words):
        diagnose_file(embedded(), effort, [], output, Console(file=io.StringIO()))


def test_a_reward_that_cannot_be_opened_is_refused_before_the_model_is(own: list[str]):
    with pytest.raises(InputError, match="no:no"):
        fill_sheet(embedded(*own, "model.path=nowhere", "reward.function=diagnosed:length"), SMALL, ["no:no"])
