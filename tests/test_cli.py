"""The command line as a new user meets it: one clear sentence for every mistake, exit code 2, nothing half-written."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

import dvpo.tasks
from dvpo import doctor
from dvpo.cli import FIRST_SPEAKS_SECONDS, main
from dvpo.config import to_yaml
from dvpo.loading import load_config
from dvpo.progress import RunProgress
from dvpo.runlog import read_rows
from dvpo.warmstart import warm_start
from runs import run_config

REWARDS = """
def by_length(prompts, completions, completion_ids, **columns):
    return [len(ids) / 12 for ids in completion_ids]

def infinite(prompts, completions, completion_ids, **columns):
    return [float("inf")] * len(prompts)

def three(prompts, completions, completion_ids, **columns):
    return [1.0] * 3

def wants_more(prompts, completions, completion_ids, gold, **columns):
    return [1.0] * len(prompts)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A newcomer's folder: a config that works, prompts and rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = run_config(Path("run"), "steps=1", "task.name=files", "task.path=prompts.jsonl")
    text = to_yaml(config).replace("function: task", "function: my_rewards:by_length")
    (tmp_path / "good.yaml").write_text(text)
    prompts = [{"prompt": f"What is {i}+{i}?", "answer": 2 * i} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "empty.jsonl").write_text("")
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `dvpo WORDS` says when it refuses: one sentence, no traceback."""
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("dvpo: ")
    assert message.count("\n") == 1
    assert "Traceback" not in message
    return message


# Mistakes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("critic.alhpa=0.1", "unknown config key critic.alhpa: did you mean critic.alpha?"),
        ("critic.adaptive_risk=true", "critic.adaptive_risk = true moves the tail terms, whose weights are 0 with"),
        ("critic.alpha=1.2", "critic.alpha = 1.2 is not valid: input should be less than or equal to 1"),
        ("task.path=empty.jsonl", "task.path: 'empty.jsonl' is empty; give it at least one row"),
        ("task.path=promts.jsonl", "there is no file or folder 'promts.jsonl'; did you mean 'prompts.jsonl'?"),
        ("task.prompt_column=question", "has no column 'question' among its columns ('prompt', 'answer')"),
        ("task.prompt_column=promt", "did you mean 'prompt'? set task.prompt_column"),
        ("sampling.max_prompt_length=3", "tokens, more than sampling.max_prompt_length = 3: raise it, or set"),
        ("sampling.max_completion_length=600", "exceed the model's context of 512 tokens (longest prompt: "),
        ("model.path=./no-model", "model.path = ./no-model is no folder: give a folder with config.json and weights"),
        ("model.path=.", "model.path = . cannot be loaded as a causal language model"),
        ("reward.function=my_reward:by_length", "'my_reward:by_length' could not be imported"),
        ("reward.function=my_rewards:by_lenght", "'my_rewards:by_lenght' could not be imported"),
        ("reward.function=by_length", "'by_length' is no name of a function; write it as module:function"),
        ("reward.function=my_rewards:wants_more", "cannot be called with the arguments"),
        ("reward.function=task", "the task prompts cannot judge an answer: set reward.function to my_module:my"),
        ("algorithm=grpoo", "algorithm = grpoo is unknown"),
        ("algorithm=my_rows:row", "algorithm = my_rows:row cannot be imported (No module named 'my_rows')"),
        ("task.name=file", "task.name = file is unknown: take math, "),
        ("task.name=my_tasks:make", "task.name = my_tasks:make cannot be made (ModuleNotFoundError"),
        ("output=prompts.jsonl/run", "output = prompts.jsonl/run cannot be made"),
        ("noise.rate=2", "noise.rate = 2 is not valid"),
    ],
)
def test_a_mistake_in_the_config_ends_in_one_sentence_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
):
    before = sorted(here.rglob("*"))
    assert words in refusal(capsys, "train", "good.yaml", override)
    assert [path for path in sorted(here.rglob("*")) if "__pycache__" not in path.parts] == before


def test_of_several_processes_one_that_was_not_ended_with_the_first_says_what_it_was_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "no.yaml"]) == 2
    assert capsys.readouterr().err.startswith("dvpo: process 1: config file no.yaml cannot be read")
    assert waited == [FIRST_SPEAKS_SECONDS]


def test_a_config_that_is_not_there_is_named(here: Path, capsys: pytest.CaptureFixture[str]):
    assert "config file goood.yaml cannot be read (No such file or directory): check the path" in refusal(
        capsys, "train", "goood.yaml"
    )


def test_a_used_output_folder_is_refused_and_left_whole(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "good.yaml"]) == 0
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    message = refusal(capsys, "train", "good.yaml")
    assert "output = run already holds a run: go on with it by --resume, or choose another output folder" in message
    assert "seed was 0 and is 3" in refusal(capsys, "train", "good.yaml", "--resume", "seed=3")
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("function", "words"), [("three", "returned 3 entries for"), ("infinite", "returned inf")])
def test_a_reward_function_whose_every_answer_has_the_wrong_form_ends_the_first_step(
    here: Path, capsys: pytest.CaptureFixture[str], function: str, words: str
):
    message = refusal(capsys, "train", "good.yaml", f"output={function}", f"reward.function=my_rewards:{function}")
    assert f"reward.function: every reward of the first step is unusable, {words}" in message
    assert not list((here / function).glob("checkpoint-*"))


def test_a_reward_function_that_always_raises_is_counted_and_never_ends_a_run(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "raising.py").write_text("def reward(prompts, completions, completion_ids, **columns):\n    return 1 / 0\n")
    assert main(["train", "good.yaml", "output=raised", "reward.function=raising:reward"]) == 0
    [row] = [row for row in read_rows(here / "raised" / "metrics.jsonl") if "reward/missing" in row]
    assert row["reward/missing"] == 1.0
    assert row["reward/observed"] is None
    assert {fault["kind"] for fault in read_rows(here / "raised" / "faults.jsonl")} == {"exception"}
    capsys.readouterr()
    assert main(["eval", "raised", "--samples", "0"]) == 0
    assert (
        "the reward failed once, and what it failed on counts in no figure; the first: Zero" in capsys.readouterr().out
    )


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk takes `after` more flushes."""
    flushes = iter(range(after))
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        if next(flushes, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)


def test_a_disk_full_at_the_start_ends_in_one_sentence_and_the_folder_can_be_used_again(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, after=0)
        assert "the disk is full: run" in refusal(capsys, "train", "good.yaml")
    assert [path for path in (here / "run").rglob("*") if path.is_file()] == []
    assert main(["train", "good.yaml"]) == 0


def test_a_disk_full_amid_a_checkpoint_leaves_the_one_before_to_resume_from(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "good.yaml"]) == 0
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, after=20)
        message = refusal(capsys, "train", "good.yaml", "steps=2", "--resume")
    assert "the disk is full: run/checkpoint-2 could not be written; free some space or choose another out" in message
    assert [path.name for path in (here / "run").glob("*checkpoint*")] == ["checkpoint-1"]
    assert main(["train", "good.yaml", "--resume", "steps=2"]) == 0
    assert (here / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
):
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvpo.trainer.Trainer.collect", interrupted)
        assert main(["train", "good.yaml"]) == 75
    assert f"dvpo: interrupted by {number.name}; `dvpo train ... --resume` goes on" in capsys.readouterr().err
    assert [path.name for path in (here / "run").glob("checkpoint-*")] == ["checkpoint-0"]
    for said in ("run begins again: no step of it was saved", "run is at its last step, 1: raise steps to train on"):
        assert main(["train", "good.yaml", "--resume"]) == 0
        assert capsys.readouterr().out.startswith(f"{said}\n")
    assert main(["train", "good.yaml", "--resume", "steps=2"]) == 0
    assert capsys.readouterr().out.startswith("resumed from run/checkpoint-1\n")


def test_what_is_interrupted_before_it_has_begun_is_not_called_resumable(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dvpo.trainer.make_task", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", "good.yaml"]) == 143
    assert capsys.readouterr().err == "dvpo: interrupted by SIGTERM; nothing was written\n"
    assert not (here / "run").exists()


def test_a_resume_may_differ_where_it_is_allowed_and_says_in_what(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "good.yaml"]) == 0
    other = ["train", "good.yaml", "--resume", "steps=2", "update.microbatch_size=1", "critic_optimiser.lr=0.1"]
    capsys.readouterr()
    message = refusal(capsys, *other)
    for said in (
        "update.microbatch_size was 64 and is 1",
        "critic_optimiser.lr was 0.001 and is 0.1",
        "accept the break by --allow critic_optimiser.lr,update.microbatch_size",
    ):
        assert said in message
    assert "microbatch_size" not in refusal(capsys, *other, "--allow", "update.microbatch_size").split("see")[0]
    assert "--allow micro: there is no such setting" in refusal(capsys, *other, "--allow", "micro")
    assert "critic_optimiser.lr was" in refusal(capsys, *other, "--allow", "update,critic")  # which is another section
    assert "add --resume" in refusal(capsys, "train", "good.yaml", "--allow", "update")
    with pytest.warns(UserWarning, match=r"resume: .* was .* and is .*, as --allow says") as warned:
        assert main([*other, "--allow", "update,critic_optimiser.lr"]) == 0
    assert len([one for one in warned if "--allow" in str(one.message)]) == 2
    assert "microbatch_size: 64" in (here / "run" / "config-1.yaml").read_text()
    assert "microbatch_size: 1\n" in (here / "run" / "config.yaml").read_text()


def test_a_fault_of_ours_is_not_passed_off_as_the_users(here: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("dvpo.trainer.Trainer.train_step", broken)
    with pytest.raises(RuntimeError, match="ours"):
        main(["train", "good.yaml"])


# Words on the command line


@pytest.mark.parametrize(
    "words",
    [
        ["good.yaml", "--print-config", "seed=5", "steps=7"],
        ["good.yaml", "seed=5", "--print-config", "steps=7"],
        ["--print-config", "good.yaml", "seed=5", "steps=7"],
        ["good.yaml", "seed=5", "steps=7", "--print-config"],
    ],
)
def test_settings_may_stand_before_and_behind_an_option_and_the_printed_config_loads(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str]
):
    assert main(["train", *words]) == 0
    (here / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(here / "printed.yaml") == load_config(here / "good.yaml", ["seed=5", "steps=7"])
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    "words",
    [["train", "good.yaml", "--continue"], ["train", "good.yaml", "--x", "a=1"], ["demo", "a=1"], ["trian"], []],
)
def test_unknown_words_end_with_exit_code_2_and_the_usage(here: Path, capsys: pytest.CaptureFixture[str], words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: dvpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "required: CONFIG.yaml\n"),
        (["train", "good.yaml", "--steps", "3"], "unrecognised argument --steps: write steps=3\n"),
        (["train", "good.yaml", "--critic.alpha=0.2", "seed=1"], "write critic.alpha=0.2\n"),
        (["eval", "run", "--seed", "--output", "x.jsonl"], "unrecognised argument --seed: write seed=VALUE\n"),
        (["train", "good.yaml", "--stepps", "3"], "unrecognised argument --stepps: see dvpo COMMAND --help\n"),
        (["report", "run", "--steps", "3"], "unrecognised argument --steps: see dvpo COMMAND --help\n"),
    ],
)
def test_words_that_make_no_sense_are_answered_with_what_does(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
):
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["train"], ["eval"], ["report"], ["inspect"], ["diagnose"], ["doctor"]]
)
def test_help_explains_every_command(capsys: pytest.CaptureFixture[str], command: list[str]):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: dvpo" in text
    for option in re.findall(r"--[a-z-]+", text):
        assert re.search(rf"{option}\b[^\n]*\n? {{3,}}\S", text) or option in ("--seed", "--help"), option


def test_python_m_dvpo_is_the_command_and_needs_no_torch_for_its_help():
    code = "import sys, dvpo.cli; sys.argv = ['dvpo', '--help']\ntry: dvpo.cli.main()\nexcept SystemExit: pass\n"
    result = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True, check=True
    )
    asked = subprocess.run([sys.executable, "-m", "dvpo", "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[1:] == asked.stdout.splitlines()[1:]


# Commands that work


def test_train_logs_plainly_when_it_is_not_a_terminal(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "good.yaml", "steps=2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"dvpo step 0/2 +held-out accuracy \(%\) ID \d+\.0 \[\d+, \d+\]", out)
    assert re.search(r"dvpo step 2/2 +observed \d\.\d+ +value error \d\.\d+ +KL \d\.\d+ +tokens/s [\d,.]+", out)
    assert "true " not in out  # nobody knows the truth of these prompts
    assert "run folder: run\n" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(("cut", "said"), [(0.2, False), (0.25, True)])
def test_the_progress_line_says_when_more_than_a_fifth_of_the_responses_are_cut(tmp_path: Path, cut: float, said: bool):
    out = io.StringIO()
    RunProgress("ppo", 1, tmp_path, console=Console(file=out)).on_step(
        1, {"reward/observed": 0.0, "reward/missing": 0.0, "rollout/truncated": cut}
    )
    assert out.getvalue().startswith(f"ppo step 1/1  observed 0.000{'  cut 0.250' if said else ''}  0 s left")


def test_progress_says_how_many_held_out_answers_have_a_reward_and_when_no_answer_of_a_run_had_one(tmp_path: Path):
    out = io.StringIO()
    figures = {"accuracy": 1.0, "accuracy_low": 0.7, "accuracy_high": 1.0, "reward": 1.0, "items": 12, "unknown": 8}
    with RunProgress("ppo", 1, tmp_path, console=Console(file=out, width=200)) as progress:
        progress.on_rewards(1, [], 16)
        progress.on_step(1, {"reward/missing": 1.0})
        progress.on_evaluation(1, {f"eval/id/{name}": value for name, value in figures.items()})
    assert "held-out accuracy (%) ID 100.0 [70, 100] (8 of 20 had no reward)\n" in out.getvalue()
    assert out.getvalue().endswith("reward: none of 16 answers had one, so nothing was learnt from them\n")


def test_eval_prints_a_table_and_writes_one_row_an_item(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "good.yaml"]) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--samples", "3"]) == 0  # these prompts have no split `ood`: what there is, is taken
    out = capsys.readouterr().out
    assert all(word in out for word in ("greedy accuracy", "mean@3", "pass@3", "pass^3", "run/evaluation-1.jsonl"))
    items = [json.loads(line) for line in (here / "run" / "evaluation-1.jsonl").read_text().splitlines()]
    assert {row["split"] for row in items} == {"id"}
    assert all(len(row["samples"]) == 3 and row["reward"] > 0 for row in items)
    for setting, draws in (([], 8), (["evaluation.samples=2"], 2)):
        assert main(["eval", "run", *setting, "--output", f"{draws}.jsonl"]) == 0
        lines = (here / f"{draws}.jsonl").read_text().splitlines()
        assert {len(json.loads(line)["samples"]) for line in lines} == {draws}
    first = (here / "run" / "evaluation-1.jsonl").read_bytes()
    assert main(["eval", "run/checkpoint-1", "--splits", "train", "--samples", "0", "evaluation.prompts=5"]) == 0
    assert len((here / "run" / "evaluation-1-2.jsonl").read_text().splitlines()) == 5
    assert (here / "run" / "evaluation-1.jsonl").read_bytes() == first
    told = json.loads((here / "run" / "evaluation-1-2.json").read_text())
    train = told["splits"].pop("train")
    assert told == {"checkpoint": "run/checkpoint-1", "overrides": ["evaluation.prompts=5"], "k": 0, "splits": {}}
    assert (train["in_split"], train["items"]) == (19, 5)  # one of the twenty prompts is held out
    assert train["accuracy_low"] <= train["accuracy"] <= train["accuracy_high"]


def test_eval_refuses_what_it_cannot_do_in_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "good.yaml"]) == 0
    capsys.readouterr()
    assert "no-run holds no sound checkpoint" in refusal(capsys, "eval", "no-run")
    assert "--splits ood: the task prompts has no such examples" in refusal(capsys, "eval", "run", "--splits", "ood")
    assert "--samples = -1 is negative" in refusal(capsys, "eval", "run", "--samples", "-1")
    assert "there is no folder no" in refusal(capsys, "eval", "run", "--output", "no/items.jsonl")
    assert "--output = prompts.jsonl: prompts.jsonl exists" in refusal(
        capsys, "eval", "run", "--output", "prompts.jsonl"
    )
    assert "run/manifest.json exists: name" in refusal(capsys, "eval", "run", "--output", "run/manifest.jsonl")
    assert "--output = x.json is the name of its summary" in refusal(capsys, "eval", "run", "--output", "x.json")


def test_a_run_that_has_no_checkpoint_yet_is_not_called_none(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text((here / "good.yaml").read_text().replace("every: 0", "every: 50"))
    said = (
        "run has no checkpoint yet (checkpoint.every = 50): wait for it, or go on with dvpo train run/config.yaml --r"
    )
    for words in (["eval", "run"], ["inspect", "run"]):
        assert said in refusal(capsys, *words)
    (here / "run" / "checkpoint-1").mkdir()  # damaged
    with pytest.warns(UserWarning, match="checkpoint-1 is skipped"):
        assert "run holds no sound checkpoint" in refusal(capsys, "eval", "run")
    assert "good.yaml is a file: give a run's folder (`output` in its config)" in refusal(capsys, "eval", "good.yaml")


def test_doctor_says_what_is_installed_and_what_a_config_needs(here: Path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "TRIAL_STEPS", 1)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch", "transformers", "pip install 'dvpo[math]'", "GPUs:", "disk free"))
    assert main(["doctor", "good.yaml", "steps=100"]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out
        for word in (
            "predicted peak at full lengths",
            "policy parameters",
            "peak memory",
            "100 steps",
            "one step (of 1: a guess)",
            "failed 0/6",
            "responses cut at 12 tokens",
            "one checkpoint on disk",
        )
    )
    assert "one process with whole models" not in out
    whole = re.search(r"weights .*", out[out.index("predicted peak") :])  # its base is that of the moment
    assert main(["doctor", "good.yaml", "distributed.strategy=fsdp"]) == 0
    sharded = capsys.readouterr().out
    assert "fsdp: what follows is one process with whole models" in sharded
    assert whole
    assert whole[0] in sharded  # what is predicted is the trial, and that has one process
    assert not (here / "run").exists()


def test_doctor_refuses_what_train_would_refuse(here: Path, capsys: pytest.CaptureFixture[str]):
    assert "did you mean critic.alpha?" in refusal(capsys, "doctor", "good.yaml", "critic.alhpa=1")
    assert "could not be imported" in refusal(capsys, "doctor", "good.yaml", "reward.function=no:no")


def test_demo_trains_both_rows_on_the_same_prompts_and_says_that_one_seed_proves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    small = ["sampling.prompts_per_step=2", "sampling.samples_per_prompt=4", "evaluation.prompts=8"]
    assert main(["demo", "--steps", "2", "--noise", "0.5", "--output", "d", "--set", *small]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("ID before", "ID after", "OOD before", "OOD after", "checker dial 1"))
    assert "One seed proves nothing" in out
    assert str(warm_start(progress=False)) in out
    prompts = {
        name: [(row["prompt_id"], row["sample"], row["true"] != row["observed"]) for row in completions][:4]
        for name in ("dvpo", "ppo")
        for completions in [list(read_rows(here / "d" / name / "completions.jsonl"))]
    }
    assert prompts["dvpo"] == prompts["ppo"]  # same prompts and same flips; both sample the first step alike
    assert all(f"d/{name}" in out for name in ("dvpo", "ppo"))
    assert "report: d/report.html" in out
    for sources in (["d/dvpo", "d/ppo"], [str(here / "d")]):
        assert main(["report", *sources]) == 0
        assert capsys.readouterr().out == "report: d/report.html\n"
    assert "Token by token" in (here / "d" / "report.html").read_text()


def test_demo_refuses_bad_settings_before_it_trains(here: Path, capsys: pytest.CaptureFixture[str]):
    assert "noise.rate = 1.5 is not valid" in refusal(capsys, "demo", "--noise", "1.5")
    assert "algorithm = pppo is unknown" in refusal(capsys, "demo", "--algorithms", "dvpo", "pppo")
    assert "steps = 0 is not valid" in refusal(capsys, "demo", "--steps", "0")
    assert not (here / "runs").exists()


def test_a_warning_of_ours_is_a_sentence_and_one_of_others_keeps_its_place(here: Path):
    assert main(["train", "good.yaml", "--print-config"]) == 0
    ours = warnings.formatwarning("few", UserWarning, doctor.__file__, 7)
    assert ours == "dvpo: warning: few\n"
    assert warnings.formatwarning("few", UserWarning, dvpo.tasks.__file__, 7) == ours
    assert "other.py:7: UserWarning: few" in warnings.formatwarning("few", UserWarning, "other.py", 7)
