"""What a run does about reward faults: counts, records, stops; and the experiments with them in small."""

import sys
from pathlib import Path

import pytest

from dvpo.cli import main
from dvpo.config import to_yaml
from dvpo.errors import InputError, RunStoppedError
from dvpo.faults import KINDS, FaultTally, fault_figures, fault_rows, stop_at_faults
from dvpo.loading import load_config
from dvpo.rewards import Fault
from dvpo.runlog import read_rows
from dvpo.sampling import Episode
from dvpo.settings import RewardConfig
from dvpo.tasks import Example
from dvpo.trainer import Trainer
from runs import Parity, run_config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))
import rewards


@pytest.mark.parametrize(
    "manner",
    [m for m in rewards.MANNERS if m.name in ("raises", "None", "os._exit", "one entry too few", "async raises")],
    ids=lambda manner: manner.name,
)
def test_counts_match_what_was_injected_exactly(tmp_path: Path, manner: rewards.Manner):
    row = rewards.run(manner, tmp_path / "run", steps=4)
    assert row["injected"] > 0
    assert row["exact"], row


@pytest.mark.slow
@pytest.mark.parametrize("manner", rewards.MANNERS, ids=lambda manner: manner.name)
def test_counts_match_in_every_manner(tmp_path: Path, manner: rewards.Manner):
    assert rewards.run(manner, tmp_path / "run", steps=8)["exact"]


def test_a_fault_that_is_not_counted_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dvpo.trainer.fault_figures", lambda faults: fault_figures(faults[1:]))
    assert not rewards.run(rewards.MANNERS[0], tmp_path / "run", steps=4)["exact"]


FAULTS = [
    Fault("exception", 0, "boom"),
    Fault("timeout", 2, "no answer", cured=True),
    Fault("exception", None, "only together", cured=True),
    Fault("wrong_type", 0, "and again"),
]


def test_faults_are_counted_by_kind_and_cured_ones_apart():
    counted = {"exception": 2, "timeout": 1, "wrong_type": 1}
    assert fault_figures(FAULTS) == {
        "reward/faults": 4.0,
        "reward/cured": 2.0,
        **{f"reward/faults_{kind}": float(counted.get(kind, 0)) for kind in KINDS},
    }


def test_an_answer_that_two_parts_of_a_mix_failed_on_is_one_that_was_lost():
    tally = FaultTally()
    tally.add([Fault("timeout", 0, "a: late"), Fault("timeout", 0, "b: late"), Fault("timeout", 1, "", cured=True)], 6)
    tally.add([Fault("exception", 0, "KeyError")], 6)
    assert str(tally) == "reward: 2 of 12 answers failed, first: timeout: a: late"


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, False),
        ({"on_fault": "stop"}, True),
        ({"max_fault_share": 0.25}, False),  # one of four lost its reward: not more than a quarter
        ({"max_fault_share": 0.24}, True),
        ({"max_fault_share": 0.0}, True),
    ],
)
def test_a_run_stops_when_more_samples_than_allowed_lost_their_reward(settings, stops):
    if not stops:
        stop_at_faults(FAULTS, 4, 7, RewardConfig(**settings))
        return
    with pytest.raises(RunStoppedError, match=r"^step 7: 1 of 4 responses .*; the last one: wrong_type: and again"):
        stop_at_faults(FAULTS, 4, 7, RewardConfig(**settings))


def test_cured_faults_stop_nothing():
    stop_at_faults([f for f in FAULTS if f.cured], 4, 1, RewardConfig(on_fault="stop"))


def test_two_rules_at_a_time_are_refused():
    with pytest.raises(InputError, match=r"reward.on_fault = stop .* reward.max_fault_share = 0.5 has no say"):
        load_config(None, ["reward.on_fault=stop", "reward.max_fault_share=0.5"])


def test_a_stopped_run_has_its_faults_on_record_and_has_not_trained_on_the_step(tmp_path: Path):
    def raising(prompts, completions, completion_ids, **columns):
        return [1 / (sum(ids) % 2) for ids in completion_ids]

    trainer = Trainer(run_config(tmp_path / "run", "reward.on_fault=stop"), task=Parity(), reward=raising)
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    with pytest.raises(RunStoppedError, match=r"ZeroDivisionError: .* \(test_faults.py:\d+\); all of them are in"):
        trainer.train()
    assert {row["kind"] for row in read_rows(tmp_path / "run" / "faults.jsonl")} == {"exception"}
    assert all((a == b).all() for a, b in zip(before, trainer.policy.model.parameters(), strict=True))


def test_the_command_ends_with_code_3_and_one_sentence(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half.py").write_text(
        "def reward(prompts, completions, completion_ids, **columns):\n"
        "    return [1 / (sum(ids) % 2) for ids in completion_ids]\n"
    )
    settings = ["reward.function=half:reward", "reward.max_fault_share=0.1", "sampling.samples_per_prompt=8"]
    (tmp_path / "run.yaml").write_text(to_yaml(run_config(tmp_path / "run", *settings)))
    assert main(["train", "run.yaml"]) == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("dvpo: the run stopped itself: step 1: ")
    assert "more than reward.max_fault_share = 0.1 allows" in said


def test_a_reward_that_fails_is_said_once_and_in_total_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "failing_rewards.py").write_text(
        "def always(completions, **columns):\n    return [c['content'] for c in completions]\n"
    )
    given = ["task.name=files", "task.path=prompts.jsonl", "reward.function=failing_rewards:always"]
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}+{i}="}}\n' for i in range(4)))
    (tmp_path / "run.yaml").write_text(to_yaml(run_config(Path("run"), "steps=2", *given)))
    assert main(["train", "run.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cause = "first: TypeError: string indices must be integers, not 'str' (failing_rewards.py:2); all of them: "
    assert [line for line in lines if "failed" in line] == [
        f"step 1, reward: 6 of 6 answers failed, {cause}run/faults.jsonl",
        f"reward: 12 of 12 answers failed, {cause}run/faults.jsonl",
    ]
    assert main(["doctor", "run.yaml"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "mean -, missing 100.0%, failed 12/12" in shown
    assert "TypeError: string indices" in shown


def test_of_many_faults_the_first_bring_their_texts_and_the_others_say_which_samples_they_struck():
    episodes = [Episode(Example(str(i), "a long prompt"), visit=1, sample=i, prompt_tokens=[]) for i in range(12)]
    rows = fault_rows([Fault("exception", i, "no") for i in range(12)] + [Fault("timeout", None, "all")], episodes)
    assert [row.get("prompt_id") for row in rows] == [*map(str, range(12)), None]
    assert ["prompt" in row for row in rows] == [True] * 8 + [False] * 5
    assert rows[9] == {"kind": "exception", "message": "no", "cured": False, "prompt_id": "9", "visit": 1, "sample": 9}
