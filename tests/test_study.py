"""A study is validated before it runs, goes on after any kill, and loses no failure."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo import study as studies
from dvpo import study_run
from dvpo.cli import main
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.study import load_study
from dvpo.study_results import FIELDS, read_results
from study_files import ROOT, study_values, workplace, write

STUDIES = sorted((ROOT / "configs" / "studies").rglob("*.yaml"))

WHERE_AND_WHEN = ("seconds", "machine", "commit")
"""Fields that two equal runs may differ in."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return workplace(tmp_path, monkeypatch)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows in the grid's order, without what tells where and when they were made."""
    rows = sorted(read_results(path), key=lambda row: (row["noise"], row["algorithm"], row["seed"]))
    return [{name: value for name, value in row.items() if name not in WHERE_AND_WHEN} for row in rows]


def table_of(file: str, output: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["study", file, f"output={output}", "--table"]) == 0
    return capsys.readouterr().out


# The file


def test_a_study_like_another_takes_from_it_what_it_does_not_say(place: Path):
    mild = {"name": "mild", "algorithm": "ppo", "overrides": {"policy_optimiser": {"lr": 1e-5}}}
    write(place, algorithms=["dvpo", mild])
    both = {"name": "both", "algorithm": "ppo", "like": "mild", "overrides": {"advantage": {"lam": 0.5}}}
    last = {"name": "last", "algorithm": "ppo", "like": "mild", "overrides": {"policy_optimiser": {"lr": 2e-5}}}
    own = {
        "like": "study.yaml",
        "output": "mine",
        "config": {"steps": 7},
        "algorithms": ["mild", both, last, "grpo"],
        "seeds": [5],
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(own))
    cells = {cell.algorithm: cell.config for cell in load_study(place / "mine.yaml", only="noise=flip").cells}
    assert list(cells) == ["mild", "both", "last", "grpo"]
    assert {(config.steps, config.noise.rate, config.evaluation.prompts, config.seed) for config in cells.values()} == {
        (7, 0.4, 8, 5)
    }
    assert [(c.algorithm, c.policy_optimiser.lr) for c in (cells["mild"], cells["both"])] == [
        ("ppo", 1e-5),
        ("ppo", 1e-5),
    ]
    assert (cells["mild"].advantage.lam, cells["both"].advantage.lam) == (0.95, 0.5)
    assert cells["last"].policy_optimiser.lr == 2e-5  # its own is on top
    assert cells["grpo"].policy_optimiser.lr != 1e-5


# Runs


def test_a_study_killed_half_way_and_resumed_gives_the_rows_and_the_table_of_an_uninterrupted_one(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    file = write(place)
    assert main(["study", file, "output=whole", "--processes", "2"]) == 0
    said = capsys.readouterr().out
    assert "12 cells, 0 of them done" in said
    assert re.search(r"\n7/12 .* left\n", said)
    assert re.search(r"\n12/12 .*ID [\d.]+ -> [\d.]+", said)
    whole = place / "whole" / "results.jsonl"
    assert [list(row) for row in read_results(whole)] == [list(FIELDS)] * 12

    results = place / "cut" / "results.jsonl"
    done = kill_half_way(file, "cut", results)
    with open(results, "ab") as torn:
        torn.write(b'{"task": "parity", "noi')
    assert main(["study", file, "output=cut", "--processes", "2"]) == 0
    assert rows_of(results) == rows_of(whole)
    assert table_of(file, "cut", capsys) == table_of(file, "whole", capsys)
    resumes = {m.parent.name: json.loads(m.read_text())["resumes"] for m in (place / "cut").rglob("manifest.json")}
    assert any(resumes.values())  # what was under way went on
    assert not any(resumes[name] for name in done)  # what was finished was left alone

    assert main(["study", file, "output=cut"]) == 0
    assert "12 cells, 12 of them done" in capsys.readouterr().out
    # One cell by itself, elsewhere, is the study's row bit for bit.
    assert main(["study", file, "output=alone", "--only", "noise=flip,seed=102,algorithm=dvpo"]) == 0
    (alone,) = rows_of(place / "alone" / "results.jsonl")
    assert alone in rows_of(whole)


def kill_half_way(file: str, output: str, results: Path) -> list[str]:
    """Start a study, kill it amid a run after five rows; returns the runs that were finished by then."""
    killed_when(
        lambda: results.exists() and results.read_bytes().count(b"\n") >= 5 and len(begun(results)) > 5,
        [file, f"output={output}", "--processes", "2"],
    )
    for lock in results.parent.rglob(".lock"):
        assert_free(lock)
    rows = read_results(results)
    assert len(rows) < 12
    return ["-".join(str(row[name]) for name in ("task", "noise", "algorithm", "seed")) for row in rows]


def begun(results: Path) -> list[Path]:
    return list(results.parent.glob("runs/*/manifest.json"))


def killed_when(condition: Callable[[], bool], words: list[str]) -> None:
    """Run `dvpo study` in a process of its own, and kill it by SIGKILL once the condition holds."""
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT / "examples")))
    study = subprocess.Popen(
        [sys.executable, "-m", "dvpo", "study", *words],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 400
    while not condition():
        assert study.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    study.kill()
    assert study.wait() == -signal.SIGKILL


def assert_free(lock: Path) -> None:
    """Nobody holds the lock, or for a moment only."""
    deadline = time.monotonic() + 60
    with open(lock) as held:
        while True:
            try:
                return fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.01)


@pytest.mark.slow
def test_a_run_dies_with_its_study_however_much_is_left_of_it(place: Path):
    metrics = place / "out" / "runs" / "parity-clean-dvpo-101" / "metrics.jsonl"
    endless = ["steps=1000000", "evaluation.every=0", "checkpoint.every=0", "--only", "seed=101,noise=clean"]
    killed_when(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2, [write(place), *endless])
    assert_free(metrics.with_name(".lock"))
    written = metrics.read_bytes()
    time.sleep(0.5)
    assert metrics.read_bytes() == written


def test_failed_runs_are_recorded_named_on_the_screen_tried_again_and_make_the_exit_code_1(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    algorithms = ["own:failing", "ppo", "own:dying"]
    file = write(place, algorithms=algorithms, noises={"clean": {}}, seeds=[1])
    assert main(["study", file, "--processes", "2"]) == 1
    said = capsys.readouterr().out
    assert "parity-clean-own.failing-1  FAILED: RuntimeError: no estimate today (out/runs/" in said
    assert "parity-clean-own.dying-1  FAILED: the run's process was ended by signal 9" in said
    assert "2 runs failed" in said
    error = place / "out" / "runs" / "parity-clean-own.failing-1" / "error"
    assert "Traceback" in error.read_text()
    (row,) = read_results(place / "out" / "results.jsonl")
    assert row["algorithm"] == "ppo"

    (place / "tomorrow").touch()
    assert main(["study", file, "--only", "algorithm=own:failing"]) == 0
    assert not error.exists()
    assert len(read_results(place / "out" / "results.jsonl")) == 2


def test_a_noise_may_be_another_one_for_a_task(place: Path):
    noises = {"hard": {"kind": "flip", "rate": 0.4, "tasks": {"b": {"kind": "persistent", "rate": 0.3}}}, "clean": {}}
    own = {"name": "own:make_task"}
    study = load_study(write(place, noises=noises, tasks={"a": own, "b": own}, algorithms=["ppo"], seeds=[1]))
    found = {(cell.task, cell.noise): (cell.config.noise.kind, cell.config.noise.rate) for cell in study.cells}
    clean = ("none", None)
    assert found == {
        ("a", "hard"): ("flip", 0.4), ("b", "hard"): ("persistent", 0.3), ("a", "clean"): clean, ("b", "clean"): clean
    }  # fmt: skip


def test_every_study_in_the_repository_is_valid(monkeypatch: pytest.MonkeyPatch):
    assert STUDIES
    monkeypatch.chdir(ROOT)
    for path in STUDIES:
        assert load_study(path).cells


# Validation, before anything runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": {}}, r"unknown key noise: did you mean noises\?"),
        ({"config": {"stpes": 3}}, r"cell parity-clean-dvpo-101: unknown config key stpes: did you mean steps\?"),
        ({"config": {"seed": 3}}, r"config: seed is set by the study itself"),
        ({"noises": {"flip": {"rat": 0.4}}}, r"cell parity-flip-.* unknown config key noise.rat: did you mean noise.r"),
        ({"noises": {"flip": 0.4}}, r"noises: flip = 0.4 is no section"),
        ({"noises": {"flip": {"tasks": {"partiy": {}}}}}, r"flip: tasks: unknown key partiy: did you mean parity\?"),
        ({"noises": {"flip": {"tasks": {"parity": 3}}}}, r"flip: tasks: parity = 3 is no section"),
        ({"noises": {False: {}}}, r"the name False must be a text"),
        ({"tasks": {}}, r"tasks = {} must be a mapping of at least one name, such as tasks: {math: {}}"),
        ({"tasks": ["math"]}, r"tasks = \['math'\] must be a mapping of at least one name, such as tasks: {math: {}}"),
        ({"noises": ["flip"]}, r"noises = \['flip'\] must be a mapping of at least one name, such as noises: {clean"),
        ({"steps": 3}, r"unknown key steps: put it under `config:`"),
        ({"task": {}}, r"unknown key task: did you mean tasks\?"),
        ({"algorithms": [{"name": "ppo", "critic": {}}]}, r"unknown key critic: put it under `overrides:`"),
        ({"algorithms": [{"name": "ppo", "seed": 3}]}, r"unknown key seed: there are name"),
        ({"algorithms": ["dvpo", "pppo"]}, r"algorithm = pppo is unknown: did you mean ppo\?"),
        ({"algorithms": ["dvpo", "dvpo"]}, r"names dvpo twice"),
        ({"algorithms": [{"name": "dvpo", "override": {}}]}, r"unknown key override: did you mean overrides\?"),
        ({"algorithms": "dvpo"}, r"algorithms = 'dvpo' must be a list"),
        ({"algorithms": [{"name": "mild", "like": "pp"}, "ppo"]}, r"mild: like = 'pp': there are"),
        ({"algorithms": ["ppo", {"name": "mild", "like": "pp"}]}, r"mild: like = 'pp': did you mean ppo\?"),
        ({"like": 3}, r"like = 3 is no file's name"),
        ({"like": "nowhere.yaml"}, r"study .*nowhere.yaml cannot be read"),
        ({"like": "study.yaml"}, r"like = 'study.yaml', which is like 'study.yaml'"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] must be a list of different whole numbers"),
        ({"seeds": [True]}, r"seeds = \[True\]"),
        ({"output": None}, r"output = None is no folder"),
        ({"noises": {"a": {}, "a-dvpo": {}}, "algorithms": ["dvpo", {"name": "dvpo-dvpo", "algorithm": "dvpo"}]},
         r"two cells would share a folder"),
    ],
)  # fmt: skip
def test_a_faulty_study_is_refused_in_one_sentence(place: Path, changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as caught:
        load_study(write(place, **changes))
    assert "\n" not in str(caught.value)
    assert not (place / "out").exists()


def test_a_runs_config_is_no_study(place: Path):
    (place / "own.yaml").write_text("output: runs/mine\nalgorithm: ppo\nstepps: 3\n")
    said = "own.yaml is a run's config, no study: dvpo train own.yaml, then its report: dvpo report runs/mine"
    with pytest.raises(InputError, match=f"^{said}$"):
        load_study("own.yaml")
    with pytest.raises(InputError, match=r"own\.yaml is a run's config, no study"):
        load_study(write(place, like="own.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=3"], "seed is an axis of the study; pick cells by --only seed=..."),
        (["--only", "noise=flop"], "the study has no such noise: did you mean flip?"),
        (["--only", "nose=flip"], "did you mean noise?"),
        (["--processes", "0"], "--processes = 0 must be at least 1"),
        (["--table"], "the results file holds no row of these cells"),
        (["--last-quarter"], "--last-quarter says how tables are made: add --table or --markdown, or drop it"),
        (["--table", "--baseline", "grpo"], "--baseline = grpo is no algorithm of these cells: take one of dvpo, ppo"),
    ],
)
def test_faulty_words_on_the_command_line_are_refused(
    place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["study", write(place), *words]) == 2
    assert message in capsys.readouterr().err


def test_overrides_are_laid_over_each_other_from_the_base_to_the_command_line(place: Path):
    own_steps, small_critic = {"overrides": {"steps": 5}}, {"critic": {"num_quantiles": 3}, "steps": 9}
    base = study_values()["config"] | {"steps": 4, "critic": {"num_quantiles": 8, "kappa": 0.3}}
    study = load_study(
        write(
            place,
            config=base,
            tasks={"math": {}, "again": {"name": "math", "overrides": {"steps": 6}}},
            noises={"clean": {}, "long": own_steps},
            algorithms=["ppo", {"name": "small", "algorithm": "dvpo", "overrides": small_critic}],
            seeds=[7],
        ),
        ["noise.low=-1"],
    )
    cells = {cell.id: cell.config for cell in study.cells}
    assert len(cells) == 8
    assert [cells[f"{place}-ppo-7"].steps for place in ("math-clean", "math-long", "again-clean", "again-long")] == [
        4, 5, 6, 5,
    ]  # fmt: skip
    assert cells["again-long-small-7"].steps == 9
    small = cells["math-clean-small-7"]
    assert (small.algorithm, small.critic.num_quantiles, small.critic.kappa) == ("dvpo", 3, 0.3)
    assert (small.task.name, cells["again-clean-small-7"].task.name) == ("math", "math")
    assert {config.noise.low for config in cells.values()} == {-1}
    assert {config.seed for config in cells.values()} == {7}
    assert small.output == "out/runs/math-clean-small-7"


def test_the_hash_changes_with_what_has_a_say_in_the_result_and_with_nothing_else(place: Path):
    def hashes(*overrides: str) -> list[str]:
        return [cell.config_hash for cell in load_study(write(place), overrides).cells]

    assert len(set(hashes())) == 12
    assert hashes("output=elsewhere", "checkpoint.every=7", "log.completions=0") == hashes()
    assert not set(hashes("evaluation.prompts=3")) & set(hashes())


def test_a_younger_setting_of_a_lists_entry_has_a_say_where_it_is_set_and_nowhere_else():
    def hashed(**more: str) -> str:
        affine = {"kind": "affine", "offset_sd": 1, "scale_sd": 1, **more}
        return studies.result_hash(load_config({"noise": {"kind": "none", "then": [affine]}}))

    # As hashed at 02fd271, which did not know `by`.
    assert hashed() == "b4577095803d"
    assert hashed(by="kind") != hashed()


def test_a_setting_that_is_added_later_leaves_a_hash_as_it_was(place: Path, monkeypatch: pytest.MonkeyPatch):
    cell = load_study(write(place)).cells[0]
    plain = studies.to_plain
    monkeypatch.setattr(studies, "to_plain", lambda config: {**plain(config), "later": 1, "more": {"later": 2}})
    assert studies.result_hash(cell.config) == cell.config_hash


@pytest.mark.parametrize(
    ("gpu", "words", "processes"),
    [
        (False, [], 7),
        (True, [], 1),
        (True, ["device=cuda:1"], 1),
        (True, ["device=cpu"], 7),
        (True, ["--processes", "3"], 3),
    ],
)
def test_runs_that_take_a_gpu_are_one_at_a_time_and_others_as_many_as_cores(
    place: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, words: list[str], processes: int
):
    asked: list[int] = []

    def trained(_: Any, processes: int) -> list[Any]:
        asked.append(processes)
        return []

    monkeypatch.setattr(study_run, "_trained", trained)
    monkeypatch.setattr(study_run.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert main(["study", write(place), *words]) == 0
    assert asked == [processes]
