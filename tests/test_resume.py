"""A run that is killed and resumed ends as if nothing had happened: same log, same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dvpo import checkpoint
from dvpo.config import to_yaml
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.resume import find_checkpoint
from dvpo.trainer import Trainer
from runs import Parity, assert_equal, left_behind, run_config

SETTINGS = [
    "steps=6",
    "checkpoint.every=2",
    "evaluation.every=3",
    "evaluation.samples=2",
    "update.epochs=2",
    "noise.kind=flip",
    "noise.rate=0.3",
    "reward.trusted=0.5",
    "policy_optimiser.schedule=cosine",
    "log.completions=6",
]


def killed(action: Callable[[], object]) -> None:
    """Run in a child of this process, which is to die by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAt:
    """An observer that kills its own run."""

    def __init__(self, moment: str, step: int) -> None:
        self.moment = (moment, step)

    def on_rewards(self, step: int, faults: object, answers: int) -> None: ...

    def on_step(self, step: int, figures: dict[str, float]) -> None:
        if self.moment == ("step", step):
            die()

    def on_evaluation(self, step: int, figures: dict[str, float]) -> None:
        if self.moment == ("evaluation", step):
            die()


# Killed


@pytest.mark.parametrize(
    ("algorithm", "moments"),
    [
        # Before the first checkpoint, between two, amid an evaluation, and when only the last checkpoint is missing.
        ("dvpo", [("evaluation", 0), ("step", 2), ("evaluation", 3), ("step", 6)]),
        ("ppo", [("step", 1), ("step", 5)]),
    ],
)
def test_killed_after_any_step_or_evaluation_and_resumed_equals_uninterrupted(
    tmp_path: Path, algorithm: str, moments: list[tuple[str, int]]
):
    settings = [*SETTINGS, f"algorithm={algorithm}"]
    whole = tmp_path / "whole"
    Trainer(run_config(whole, *settings), task=Parity()).train()
    for moment in moments:
        folder = tmp_path / "-".join(map(str, moment))
        config = run_config(folder, *settings)
        killed(Trainer(config, task=Parity(), observer=DiesAt(*moment)).train)
        Trainer(config, task=Parity(), resume=True).train()
        assert_equal(folder, whole)


def test_killed_amid_a_checkpoint_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    Trainer(run_config(whole, *SETTINGS), task=Parity()).train()
    trainer = Trainer(config := run_config(folder, *SETTINGS), task=Parity())
    with monkeypatch.context() as patch:
        seal = checkpoint._seal
        patch.setattr(checkpoint, "_seal", lambda aside: die() if aside.name.endswith("-4") else seal(aside))
        killed(trainer.train)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    Trainer(config, task=Parity(), resume=True).train()
    assert_equal(folder, whole)
    assert not list(folder.glob(".*"))


def test_killed_twice_and_resumed_twice_equals_uninterrupted(tmp_path: Path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    Trainer(run_config(whole, *SETTINGS), task=Parity()).train()
    config = run_config(folder, *SETTINGS)
    killed(Trainer(config, task=Parity(), observer=DiesAt("step", 3)).train)
    killed(Trainer(config, task=Parity(), observer=DiesAt("step", 5), resume=True).train)
    Trainer(config, task=Parity(), resume=True).train()
    assert_equal(folder, whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [resume["step"] for resume in manifest["resumes"]] == [2, 4]


def command(config: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dvpo", "train", str(config), *words],
        cwd=config.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_after(run: subprocess.Popen[bytes], metrics: Path, lines: int, number: int = signal.SIGKILL) -> int:
    """Signal a run that has logged so many lines; its exit code."""
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        assert run.poll() is None, run.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.send_signal(number)
    return run.wait(timeout=400)


def by_command(folder: Path, *settings: str) -> Path:
    """A config for a run from the command line, with a reward function of the user's own in its worker process."""
    (folder / "my_reward.py").write_text(
        "def parity(prompts, completions, completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2 == 0) for ids in completion_ids]\n"
    )
    path = folder / "config.yaml"
    path.write_text(
        to_yaml(run_config(folder / "run", *settings, "task.name=math", "reward.function=my_reward:parity"))
    )
    return path


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)]
)
def test_the_command_killed_in_the_middle_and_resumed_equals_a_run_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
):
    """The killed and the resumed run are processes of their own; the uninterrupted one is this process."""
    file = by_command(tmp_path, *SETTINGS)
    assert kill_after(command(file), tmp_path / "run" / "metrics.jsonl", 4, number) == code
    run = command(file, "--resume")
    _, errors = run.communicate(timeout=400)
    assert run.returncode == 0, errors.decode()
    monkeypatch.chdir(tmp_path)
    Trainer(load_config(file, [f"output={tmp_path / 'whole'}"])).train()
    assert_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dvpo", "ppo"])
def test_the_command_killed_at_many_moments_and_resumed_equals_an_uninterrupted_command(tmp_path: Path, algorithm: str):
    settings = [*SETTINGS, f"algorithm={algorithm}"]
    (tmp_path / "whole").mkdir()
    whole = command(by_command(tmp_path / "whole", *settings))
    assert whole.wait(timeout=400) == 0
    for lines in (1, 2, 3, 5, 8):
        folder = tmp_path / str(lines)
        folder.mkdir()
        file = by_command(folder, *settings)
        assert kill_after(command(file), folder / "run" / "metrics.jsonl", lines) == -signal.SIGKILL
        assert command(file, "--resume").wait(timeout=400) == 0
        assert_equal(folder / "run", tmp_path / "whole" / "run")


# Resumed wrongly


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    Trainer(run_config(tmp_path / "run", *SETTINGS, "steps=4"), task=Parity()).train()
    return tmp_path / "run"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_config_is_refused_with_every_key_that_differs_and_nothing_is_touched(finished: Path):
    before = everything(finished)
    other = run_config(finished, *SETTINGS, "steps=4", "seed=3", "critic.weights.cvar=0.5")
    with pytest.raises(InputError) as caught:
        Trainer(other, task=Parity(), resume=True)
    assert "seed was 0 and is 3; critic.weights.cvar was 0.0 and is 0.5" in str(caught.value)
    assert everything(finished) == before


def test_more_steps_other_evaluations_and_logs_are_the_same_run(finished: Path):
    longer = run_config(finished, *SETTINGS, "evaluation.every=0", "checkpoint.keep=1", "log.completions=0")
    with pytest.warns(UserWarning, match="steps was 4 and is 6, and policy_optimiser.schedule = cosine falls to 0"):
        trainer = Trainer(longer, task=Parity(), resume=True)
    assert trainer.step == 4
    trainer.train()
    assert trainer.step == 6
    assert [path.name for path in finished.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_run_may_go_on_in_another_folder_on_another_device_and_by_another_strategy(finished: Path, tmp_path: Path):
    moved = finished.rename(tmp_path / "moved")
    elsewhere = ["steps=4", "device=cpu", "distributed.strategy=fsdp"]  # it was: device = auto, ddp
    assert find_checkpoint(run_config(moved, *SETTINGS, *elsewhere)) == moved / "checkpoint-4"
    with pytest.raises(InputError, match=r"^resume: critic\.kappa was 0\.1 and is 0\.2 \(see"):
        find_checkpoint(run_config(moved, *SETTINGS, *elsewhere, "critic.kappa=0.2"))


def test_fewer_steps_than_were_done_are_refused_without_a_warning_of_what_would_follow(
    finished: Path, recwarn: pytest.WarningsRecorder
):
    with pytest.raises(InputError, match=r"steps = 2 lies before .*checkpoint-4: raise it"):
        Trainer(run_config(finished, *SETTINGS, "steps=2"), task=Parity(), resume=True)
    assert not [warning for warning in recwarn if "resume" in str(warning.message)]


@pytest.mark.parametrize("setting", ["num_heads=1", "num_quantiles=4", "monotone=false", "features=true"])
def test_a_resume_cannot_give_the_critic_another_form(finished: Path, setting: str):
    name, _, value = setting.partition("=")
    other = run_config(finished, *SETTINGS, "steps=6", f"critic.{setting}")
    with pytest.raises(
        InputError, match=rf"critic.{name} = {value.title()}: the checkpoint's critic has .*, and its form"
    ):
        Trainer(other, task=Parity(), resume=True, allow=["critic"])


def test_a_finished_run_that_is_resumed_does_nothing(finished: Path):
    before = left_behind(finished)
    assert Trainer(run_config(finished, *SETTINGS, "steps=4"), task=Parity(), resume=True).train() == {}
    assert left_behind(finished) == before


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path):
    with pytest.raises(InputError, match="holds no run to resume: check the path, or start without --resume"):
        Trainer(run_config(tmp_path / "run"), task=Parity(), resume=True)
    assert not (tmp_path / "run").exists()


def test_a_fresh_run_never_writes_over_another(finished: Path):
    before = everything(finished)
    with pytest.raises(InputError, match="already holds a run: go on with it by --resume, or choose another output"):
        Trainer(run_config(finished, *SETTINGS), task=Parity())
    assert everything(finished) == before


@pytest.mark.parametrize("victim", ["state.safetensors", "policy/model.safetensors", "critic/critic.safetensors"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(finished: Path, victim: str):
    damaged = finished / "checkpoint-4" / victim
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"checkpoint-4 is skipped: {victim} is damaged"):
        trainer = Trainer(run_config(finished, *SETTINGS, "steps=4"), task=Parity(), resume=True)
    assert trainer.step == 2
    trainer.close()


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_keeps_its_logs(finished: Path):
    for state in finished.glob("checkpoint-*/state.json"):
        state.write_bytes(b"")
    before = everything(finished)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(InputError, match=r"no sound checkpoint, every one is damaged \(checkpoint-2, checkpoint-4\)"),
    ):
        Trainer(run_config(finished, *SETTINGS, "steps=4"), task=Parity(), resume=True)
    assert everything(finished) == before
