"""Run logs: exact rows, equal logs after a kill and resume, refusals, provenance."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dvpo import provenance, runlog
from dvpo.durable import DiskFullError
from dvpo.errors import InputError
from dvpo.runlog import STREAMS, TIME_PREFIX, RunLog, read_rows
from dvpo.settings_learning import LogConfig


def open_log(folder: Path, resume_step: int | None = None, **options) -> RunLog:
    return RunLog(folder, "seed: 3\n", seed=3, device="cpu", resume_step=resume_step, **options)


def write_step(log: RunLog, step: int) -> None:
    log.metrics(step, {"reward": step / 3, "time/step": float(np.random.rand())})
    log.completions(step, [{"prompt": "1+1=", "completion": "2\n\u2028", "reward": 1.0}] * 2)
    if step % 2:
        log.faults(step, [{"error": "reward timed out"}])


def streams_apart_from_times(folder: Path) -> dict[str, list[dict]]:
    return {
        name: [
            {key: value for key, value in row.items() if not key.startswith(TIME_PREFIX)}
            for row in read_rows(folder / name)
        ]
        for name in STREAMS
    }


def kill_during(action) -> None:
    child = os.fork()
    if child == 0:
        action()
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


# --- rows --------------------------------------------------------------------------


def test_floats_come_back_with_every_bit(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 1e-308, 5e-324, -0.0, 2.0**53 + 2, torch.tensor(0.1), np.float32(0.1)]
    with open_log(tmp_path) as log:
        log.metrics(1, {str(i): value for i, value in enumerate(values)})
    [row] = read_rows(tmp_path / "metrics.jsonl")
    assert [repr(row[str(i)]) for i in range(len(values))] == [repr(float(value)) for value in values]


def test_lines_are_strict_json_with_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    with open_log(tmp_path) as log:
        log.metrics(1, {"a": nan, "b": -inf, "c": torch.tensor(nan), "d": 3, "e": True})
        log.completions(1, [{"rewards": (1.0, nan, None), "ids": torch.tensor([1, 2]), "path": Path("x")}])

    def strict(line: str) -> dict:
        return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    metrics = strict((tmp_path / "metrics.jsonl").read_text())
    assert metrics == {"step": 1, "a": None, "b": None, "c": None, "d": 3, "e": True}
    completions = strict((tmp_path / "completions.jsonl").read_text())
    assert completions == {"step": 1, "rewards": [1.0, None, None], "ids": [1, 2], "path": "x"}


def test_a_row_is_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        write_step(log, 1)
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_only_rank_0_writes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runlog, "is_main", lambda: False)
    with open_log(tmp_path / "run", log=LogConfig(tensorboard=True)) as log:
        write_step(log, 1)
        log.sync()
    assert not (tmp_path / "run").exists()


# --- kill and resume --------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [-1, 0, 2, 4])
def test_a_killed_and_resumed_log_equals_an_uninterrupted_one(tmp_path: Path, checkpoint: int) -> None:
    with open_log(tmp_path / "whole") as log:
        for step in range(8):
            write_step(log, step)

    def killed_run() -> None:
        log = open_log(tmp_path / "killed")
        for step in range(6):
            write_step(log, step)
        with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 6, "reward": 2')

    kill_during(killed_run)
    with open_log(tmp_path / "killed", resume_step=checkpoint) as log:
        for step in range(checkpoint + 1, 8):
            write_step(log, step)

    assert streams_apart_from_times(tmp_path / "killed") == streams_apart_from_times(tmp_path / "whole")
    assert (tmp_path / "killed/completions.jsonl").read_bytes() == (tmp_path / "whole/completions.jsonl").read_bytes()


def test_a_resume_that_drops_nothing_would_fail_the_test_above(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in (1, 2, 3):
            write_step(log, step)
    with open_log(tmp_path, resume_step=3) as log:  # the checkpoint was of step 2
        write_step(log, 3)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 3]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_half_written_last_line_is_left_out_wherever_it_was_cut(tmp_path: Path, cut: int) -> None:
    with open_log(tmp_path) as log:
        log.metrics(1, {"reward": 0.25})
        log.metrics(2, {"reward": 0.125})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    # A cut of one takes only the line's end, and the row is whole.
    expected = [1, 2] if cut == 1 else [1]
    assert [row["step"] for row in read_rows(path)] == expected
    open_log(tmp_path, resume_step=2).close()
    assert path.read_bytes().count(b"\n") == len(expected)


def test_a_damaged_line_further_up_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        write_step(log, 1)
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 0}\n{"step"\n' + path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"metrics.jsonl is damaged at line 2: remove that line"):
        open_log(tmp_path, resume_step=1)
    assert path.read_bytes() == damaged
    assert not list(tmp_path.glob(".tmp-*"))


# --- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", ["manifest.json", "metrics.jsonl", "checkpoint-5"])
def test_a_fresh_run_does_not_touch_a_folder_that_holds_one(tmp_path: Path, evidence: str) -> None:
    (tmp_path / evidence).mkdir()
    with pytest.raises(
        InputError, match=rf"{tmp_path} already holds a run: go on with it by --resume, or choose another output"
    ):
        open_log(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [evidence]


def test_a_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run to resume"):
        open_log(tmp_path / "absent", resume_step=5)
    assert not (tmp_path / "absent").exists()


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path, monkeypatch) -> None:
    class Disk(runlog.FileIO):
        """A disk with room for 10 more bytes."""

        room = 10

        def write(self, data) -> int:
            if not Disk.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = super().write(data[: Disk.room])
            Disk.room -= written
            return written

    with open_log(tmp_path) as log:
        write_step(log, 1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(runlog, "FileIO", Disk)
    with (
        open_log(tmp_path, resume_step=1) as log,
        pytest.raises(DiskFullError, match=r"the disk is full: .*metrics"),
    ):
        log.metrics(2, {"reward": 0.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# --- provenance --------------------------------------------------------------------------


def test_the_manifest_says_where_a_run_comes_from_and_lists_its_resumes(tmp_path: Path) -> None:
    open_log(tmp_path, in_python={"task": "math"}).close()
    open_log(tmp_path, resume_step=0).close()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["seed"] == 3
    assert [session["in_python"] for session in (manifest, *manifest["resumes"])] == [{"task": "math"}, {}]
    assert manifest["argv"] == sys.argv
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["machine"]["threads"] == torch.get_num_threads()
    assert manifest["config_hash"] == provenance.config_hash("seed: 3\n") != provenance.config_hash("seed: 4\n")
    assert [resume["step"] for resume in manifest["resumes"]] == [0]
    assert len(manifest["run_id"]) == 12
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"


def test_a_second_resume_at_one_step_keeps_what_the_first_had_changed(tmp_path: Path) -> None:
    for text, step in (("a: 1\n", None), ("a: 2\n", 4), ("a: 3\n", 4)):
        RunLog(tmp_path, text, seed=3, device="cpu", resume_step=step).close()
    kept = {path.name: path.read_text() for path in tmp_path.glob("config*.yaml")}
    assert kept == {"config.yaml": "a: 3\n", "config-4.yaml": "a: 1\n", "config-4-2.yaml": "a: 2\n"}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """A checkout with a package in it, standing in for ours."""
    package = tmp_path / "repository" / "src" / "dvpo"
    package.mkdir(parents=True)
    (package / "errors.py").write_text("old = 1\n")
    (tmp_path / "repository" / "notes.txt").write_text("private")
    git(tmp_path / "repository", "init", "-q")
    git(tmp_path / "repository", "add", "src")
    git(tmp_path / "repository", "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    return package


def test_a_clean_checkout_has_a_commit_and_no_diff(package: Path, tmp_path: Path) -> None:
    assert provenance.source() == (git(package, "rev-parse", "HEAD").strip(), False, "")
    open_log(tmp_path / "run").close()
    assert not (tmp_path / "run" / "dirty.diff").exists()


def test_the_dirty_diff_rebuilds_the_source_and_holds_nothing_else(package: Path, tmp_path: Path) -> None:
    (package / "errors.py").write_text("new = 2\n")
    (package / "añadido.py").write_text("added = 3\n")
    (package / "data.bin").write_bytes(bytes(range(256)))
    open_log(tmp_path / "run").close()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["dirty"] is True
    diff = tmp_path / "run" / manifest["diff"]
    assert "private" not in diff.read_text()

    git(tmp_path, "clone", "-q", "repository", "clone")
    rebuilt = tmp_path / "clone" / "src" / "dvpo"
    git(rebuilt, "apply", str(diff))
    for name in ("errors.py", "añadido.py", "data.bin"):
        assert (rebuilt / name).read_bytes() == (package / name).read_bytes()


def test_an_installed_package_inside_somebody_elses_repository_has_no_commit(package: Path, monkeypatch) -> None:
    installed = package.parent / "site-packages" / "dvpo"
    installed.mkdir(parents=True)
    (installed / "errors.py").write_text("")
    monkeypatch.setattr(provenance, "PACKAGE", installed)
    assert provenance.source() == (None, None, None)


def test_a_machine_without_git_still_logs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    open_log(tmp_path).close()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["commit"], manifest["dirty"], manifest["diff"]) == (None, None, None)


def test_a_processor_is_named_with_family_and_model_where_the_system_says_them(tmp_path: Path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: Some CPU\n\nmodel name\t: the second core\n")
    assert provenance.cpu_model(listing) == "Some CPU (family 26, model 2)"
    listing.write_text("model name\t: Some CPU\n")
    assert provenance.cpu_model(listing) == "Some CPU"
    assert provenance.cpu_model(tmp_path / "none")  # what Python knows of it
