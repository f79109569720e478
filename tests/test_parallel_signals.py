"""The command under torchrun is told to stop, or loses a process: a sound checkpoint, nobody left over, it goes on."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dvpo.checkpoint import latest_checkpoint
from dvpo.cli import main
from dvpo.config import to_yaml
from dvpo.runlog import read_rows
from processes import SPEAKING, TORCHRUN
from runs import run_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EVERY = 5
"""Steps from one checkpoint to the next."""


@contextmanager
def two_processes(folder: Path, strategy: str) -> Iterator[subprocess.Popen]:
    """A run without end under torchrun, which is at its eighth step or so; what it says stands in `folder / "said"`."""
    settings = ["task.name=math", "steps=100000", f"checkpoint.every={EVERY}", "evaluation.prompts=1"]
    (folder / "mine.yaml").write_text(to_yaml(run_config(folder / "run", *settings)))
    command = [*TORCHRUN, "--nproc-per-node=2", "-m", "dvpo", "train", str(folder / "mine.yaml")]
    with (folder / "said").open("w") as said:
        launcher = subprocess.Popen(
            [*command, f"distributed.strategy={strategy}"],
            stdout=said,
            stderr=said,
            env={**os.environ, **SPEAKING},
            start_new_session=True,
        )
        try:
            wait_until(lambda: steps_in(folder / "run") > EVERY + 2 or launcher.poll() is not None, 400)
            assert launcher.poll() is None, (folder / "said").read_text()
            yield launcher
        finally:
            launcher.kill()
            launcher.wait()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_in(run: Path) -> int:
    log = run / "metrics.jsonl"
    return max((row["step"] for row in read_rows(log)), default=0) if log.exists() else 0


def processes_of(launcher: subprocess.Popen) -> dict[int, int]:
    """Rank -> process."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {child: Path(f"/proc/{child}/environ").read_text().split("\0") for child in children}
    return {
        int(setting.partition("=")[2]): int(child)
        for child, environment in environments.items()
        for setting in environment
        if setting.startswith("RANK=")
    }


def assert_it_goes_on(folder: Path) -> None:
    """One process makes one step more than the newest checkpoint has."""
    checkpoint = latest_checkpoint(folder / "run")
    assert checkpoint is not None
    step = int(checkpoint.name.partition("-")[2]) + 1
    assert main(["train", str(folder / "mine.yaml"), "--resume", f"steps={step}"]) == 0
    assert steps_in(folder / "run") == step


@pytest.mark.parametrize(
    ("whom", "number", "strategy"),
    [("launcher", signal.SIGTERM, "fsdp"), ("all", signal.SIGINT, "ddp"), (1, signal.SIGTERM, "ddp")],
)
def test_a_signal_to_the_launcher_to_all_or_to_one_process_ends_in_a_checkpoint_of_the_last_step(
    tmp_path: Path, whom: str | int, number: signal.Signals, strategy: str
):
    with two_processes(tmp_path, strategy) as launcher:
        ranks = processes_of(launcher)
        assert sorted(ranks) == [0, 1]
        if whom == "all":  # Ctrl-C in a terminal
            os.killpg(launcher.pid, number)
        else:
            os.kill(ranks[whom] if isinstance(whom, int) else launcher.pid, number)
        assert launcher.wait(200) == 1
        assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    said = (tmp_path / "said").read_text()
    assert said.count(f"dvpo: interrupted by {number.name}; `dvpo train ... --resume` goes on") == 1
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{steps_in(tmp_path / 'run')}"
    assert_it_goes_on(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_takes_the_other_along_and_the_last_checkpoint_goes_on(tmp_path: Path, rank: int):
    with two_processes(tmp_path, "fsdp") as launcher:
        ranks = processes_of(launcher)
        os.kill(ranks[rank], signal.SIGKILL)
        assert launcher.wait(200) == 1
        assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert int(checkpoint.name.partition("-")[2]) % EVERY == 0
    assert_it_goes_on(tmp_path)
