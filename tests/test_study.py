"""A study is validated before it runs, goes on after any kill, loses no failure, and its tables are hand arithmetic."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo import study as studies
from dvpo.cli import main
from dvpo.errors import InputError
from dvpo.study import load_study
from dvpo.study_results import FIELDS, ResultsFile, last_quarter, read_results, result_row
from dvpo.study_table import make_report, to_markdown
from runs import SETTINGS, model_folder

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT / "configs" / "studies").rglob("*.yaml"))

OWN = """
import dataclasses, os, signal
from dvpo.algorithms import ALGORITHMS
from dvpo.tasks import Example
from runs import Parity

class Wide(Parity):
    def split(self, name):
        count = {"train": 16, "id": 8, "ood": 4}.get(name, 0)
        return [Example(f"{name} {i}", [{"role": "user", "content": f"{name} {i * i}"}]) for i in range(count)]

def make_task(settings):
    return Wide()

def fail(signals, config):
    if not os.path.exists("tomorrow"):
        raise RuntimeError("no estimate today")
    return ALGORITHMS["ppo"].estimate(signals, config)

def die(signals, config):
    os.kill(os.getpid(), signal.SIGKILL)

failing = dataclasses.replace(ALGORITHMS["ppo"], name="failing", estimate=fail)
dying = dataclasses.replace(ALGORITHMS["ppo"], name="dying", estimate=die)
"""

WHERE_AND_WHEN = ("seconds", "machine", "commit")
"""Fields that two equal runs may differ in."""


def study_values(**changes: Any) -> dict[str, Any]:
    base = {
        **SETTINGS,
        "model": {"path": model_folder()},
        "steps": 3,
        "evaluation": {"every": 1, "prompts": 8},
        "checkpoint": {"every": 1},
    }
    return {
        "output": "out",
        "config": base,
        "tasks": {"parity": {"name": "own:make_task"}},
        "noises": {"clean": {}, "flip": {"kind": "flip", "rate": 0.4}},
        "algorithms": ["dvpo", "ppo", {"name": "reinforce", "algorithm": "own_algorithm:reinforce"}],
        "seeds": [101, 102],
        **changes,
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user with own code."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def write(place: Path, **changes: Any) -> str:
    path = place / "study.yaml"
    path.write_text(yaml.safe_dump(study_values(**changes), sort_keys=False))
    return str(path)


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
    own = {
        "like": "study.yaml",
        "output": "mine",
        "config": {"steps": 7},
        "algorithms": ["mild", both, "grpo"],
        "seeds": [5],
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(own))
    cells = {cell.algorithm: cell.config for cell in load_study(place / "mine.yaml", only="noise=flip").cells}
    assert list(cells) == ["mild", "both", "grpo"]
    assert {(config.steps, config.noise.rate, config.evaluation.prompts, config.seed) for config in cells.values()} == {
        (7, 0.4, 8, 5)
    }
    assert [(c.algorithm, c.policy_optimiser.lr) for c in (cells["mild"], cells["both"])] == [
        ("ppo", 1e-5),
        ("ppo", 1e-5),
    ]
    assert (cells["mild"].advantage.lam, cells["both"].advantage.lam) == (0.95, 0.5)
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
        ({"tasks": {}}, r"tasks = {} must name at least one"),
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=3"], "seed is an axis of the study; pick cells by --only seed=..."),
        (["--only", "noise=flop"], "the study has no such noise: did you mean flip?"),
        (["--only", "nose=flip"], "did you mean noise?"),
        (["--processes", "0"], "--processes = 0 must be at least 1"),
        (["--table"], "the results file holds no row of these cells"),
        (["--table", "--baseline", "grpo"], "--baseline = grpo is no algorithm of these cells: take one of dvpo, ppo"),
    ],
)
def test_faulty_words_on_the_command_line_are_refused(
    place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["study", write(place), *words]) == 2
    assert message in capsys.readouterr().err


def test_overrides_are_laid_over_each_other_from_the_base_to_the_command_line(place: Path):
    own_steps = {"overrides": {"steps": 5}}
    base = study_values()["config"] | {"steps": 4, "critic": {"num_quantiles": 8, "kappa": 0.3}}
    study = load_study(
        write(
            place,
            config=base,
            tasks={"math": {}, "again": {"name": "math", "overrides": {"steps": 6}}},
            noises={"clean": {}, "long": own_steps},
            algorithms=["ppo", {"name": "small", "algorithm": "dvpo", "overrides": {"critic": {"num_quantiles": 3}}}],
            seeds=[7],
        ),
        ["noise.low=-1"],
    )
    cells = {cell.id: cell.config for cell in study.cells}
    assert len(cells) == 8
    assert [cells[f"{place}-ppo-7"].steps for place in ("math-clean", "math-long", "again-clean", "again-long")] == [
        4, 5, 6, 5,
    ]  # fmt: skip
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


def test_a_setting_that_is_added_later_leaves_a_hash_as_it_was(place: Path, monkeypatch: pytest.MonkeyPatch):
    cell = load_study(write(place)).cells[0]
    plain = studies.to_plain
    monkeypatch.setattr(studies, "to_plain", lambda config: {**plain(config), "later": 1, "more": {"later": 2}})
    assert studies.result_hash(cell.config) == cell.config_hash


# The results file


def a_row(**changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(FIELDS) | {"task": "parity", "noise": "clean", "algorithm": "dvpo", "seed": 101}
    return row | {"config_hash": "0" * 12, "curve": [[0, 0.5, None], [3, 0.5, None]], "id_true": 0.5} | changes


def test_a_row_of_other_settings_is_refused_with_what_to_do_and_nothing_runs(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    (place / "out").mkdir()
    (place / "out" / "results.jsonl").write_text(json.dumps(a_row()) + "\n")
    assert main(["study", write(place)]) == 2
    said = capsys.readouterr().err
    assert "holds a row of parity-clean-dvpo-101 whose settings (config_hash 000000000000) are not those" in said
    assert "give the study another output" in said
    assert not (place / "out" / "runs").exists()


def test_an_unfinished_run_of_other_settings_is_refused_before_anything_runs(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    run = place / "out" / "runs" / "parity-flip-ppo-102"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 77\n")
    assert main(["study", write(place)]) == 2
    assert "out/runs/parity-flip-ppo-102 holds a run of other settings" in capsys.readouterr().err


def test_a_torn_last_line_is_mended_and_a_damaged_one_before_it_is_not(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    whole = json.dumps(a_row()).encode()
    path.write_bytes(whole + b"\n" + whole[:30])
    assert read_results(path) == [a_row()]  # reading changes nothing
    assert path.read_bytes().endswith(whole[:30])
    with ResultsFile(path) as file:
        file.append(a_row(seed=102))
    assert read_results(path) == [a_row(), a_row(seed=102)]
    path.write_bytes(whole)  # whole but for its end
    with ResultsFile(path) as file:
        file.append(a_row(seed=102))
    assert read_results(path) == [a_row(), a_row(seed=102)]
    path.write_bytes(whole[:30] + b"\n" + whole + b"\n")
    with pytest.raises(InputError, match="is damaged at line 1: remove that line"):
        ResultsFile(path)
    path.write_bytes((whole + b"\n") * 2)
    with pytest.raises(InputError, match="line 2 is a second row of parity-clean-dvpo-101"):
        ResultsFile(path)


def test_two_studies_never_write_one_file(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path), pytest.raises(InputError, match="is being written by another dvpo study"):
        ResultsFile(path)
    with ResultsFile(path):
        pass


def test_a_row_is_read_from_the_log_of_its_run(place: Path):
    (cell, *_) = load_study(write(place), ["steps=10"]).cells
    cell.folder.mkdir(parents=True)
    evaluations = {0: (0.25, 0.5), 5: (0.75, None), 10: (0.5, 0.25)}
    rows: list[dict[str, Any]] = [
        {"step": step, "eval/id/accuracy": at_id, "eval/ood/accuracy": at_ood}
        for step, (at_id, at_ood) in evaluations.items()
    ]
    # The last 20% of 10 steps are 9 and 10; step 10 has none, as when all its rewards are equal: .3 alone counts.
    correlations = {8: 0.9, 9: 0.3, 10: None}
    rows += [
        {"step": step, "critic/true_correlation": correlations.get(step, 0.8), "time/step": 0.25}
        for step in range(1, 11)
    ]
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = {"commit": "abc", "dirty": False, "machine": {"gpu": None, "cpu": "this"}}
    other = {"commit": "def", "dirty": True, "machine": {"gpu": "that", "cpu": "this"}}
    (cell.folder / "manifest.json").write_text(json.dumps({**session, "resumes": [session, other]}))
    assert result_row(cell) == {
        **{"task": "parity", "noise": "clean", "algorithm": "dvpo", "seed": 101},
        **{"id_before": 0.25, "ood_before": 0.5, "id_true": 0.5, "ood_true": 0.25, "peak_true": 0.75},
        "curve": [[0, 0.25, 0.5], [5, 0.75, None], [10, 0.5, 0.25]],
        **{"corr": 0.3, "seconds": 2.5, "machine": "this + that", "commit": "abc + def-dirty"},
        "config_hash": cell.config_hash,
    }
    (unfinished, *_) = load_study(write(place), ["steps=11"]).cells
    with pytest.raises(InputError, match="lacks an evaluation at its start or end"):
        result_row(unfinished)


def test_the_last_quarter_is_averaged_split_by_split_and_the_start_is_no_part_of_it():
    curve = [[0, 0.1, 0.1], [4, 0.5, 0.5], [6, 0.6, None], [8, 0.9, 0.3]]
    averaged = last_quarter(a_row(curve=curve, id_true=0.9, ood_true=0.3))
    assert averaged["id_true"] == pytest.approx(0.75)  # of steps 6 and 8 of 8
    assert averaged["ood_true"] == 0.3
    assert last_quarter(a_row(curve=[[0, 0.1, None], [1, 0.4, None]]))["id_true"] == 0.4
    assert last_quarter(a_row(curve=[[0, 0.1, None], [1, 0.4, None]]))["ood_true"] is None


# Tables


def scored(noise: str, algorithm: str, scores: Sequence[float | None]) -> list[dict[str, Any]]:
    """Rows of seeds 1, 2, ... that began at 40%, peaked at 90%, and ended with these scores in %; None: no row."""
    return [
        a_row(noise=noise, algorithm=algorithm, seed=seed, id_before=0.4, id_true=score / 100, peak_true=0.9,
              curve=[[0, 0.4, None], [1, 0.9, None], [3, score / 100, None]])
        for seed, score in enumerate(scores, start=1)
        if score is not None
    ]  # fmt: skip


def lines_of(place: Path, rows: list[dict[str, Any]], **changes: Any) -> list[dict[tuple[str, str], dict[str, str]]]:
    """For each table: (algorithm, split) -> column -> text."""
    study = load_study(write(place, algorithms=["dvpo", "ppo", "grpo"], seeds=[1, 2, 3, 4], **changes))
    report = make_report(study, rows)
    return [
        {(line[0], line[1]): dict(zip(sheet.columns, line, strict=True)) for line in sheet.lines}
        for sheet in report.sheets
        if "split" in sheet.columns
    ]


CLEAN = [
    *scored("clean", "dvpo", [60, 70, 50, 80]),
    *scored("clean", "ppo", [50, 50, 40, 60]),
    *scored("clean", "grpo", [50, 60, 30, 60]),
]
FLIP = [
    *scored("flip", "dvpo", [40, 40, 30, 60]),
    *scored("flip", "ppo", [40, 50, 20, 50]),
    *scored("flip", "grpo", [50, 60, 30, 60]),
]


def test_the_table_of_one_place_equals_hand_arithmetic(place: Path):
    (lines,) = lines_of(place, CLEAN, noises={"clean": {}})
    assert set(lines) == {("dvpo", "ID"), ("ppo", "ID"), ("grpo", "ID")}  # the task has no OOD split
    dvpo, ppo, grpo = (lines[name, "ID"] for name in ("dvpo", "ppo", "grpo"))
    # IQM of 50 60 70 80: one dropped at each end, 65. Mean 65 less the peak of 90: -25.
    assert dvpo["end, IQM [95%]"].startswith("65.0 [")
    assert (dvpo["seeds"], dvpo["before"], dvpo["end less peak"]) == ("4", "40.0", "-25.0")
    # Pairs won: 60 beats 50 50 40 and ties 60 (3.5), 70 all (4), 50 ties two and beats 40 (2), 80 all (4): 13.5/16.
    assert dvpo["beats ppo [95%]"].startswith("0.84 [")
    # Differences 10 20 10 20: mean 15, sd sqrt(100/3) = 5.774, t(3) = 3.182, half = 3.182 * 5.774 / 2 = 9.19.
    assert dvpo["less ppo, paired [95%]"] == "+15.0 [+5.8, +24.2]"
    # All of one sign: 2 of 16 sign vectors reach the sum. grpo's 0 10 -10 0 sum to 0: p = 1. Holm: 2 * .125, 1.
    assert (dvpo["p (Holm)"], grpo["p (Holm)"]) == ("0.250", "1.000")
    assert grpo["less ppo, paired [95%]"].startswith("+0.0 [")
    assert (ppo["beats ppo [95%]"], ppo["p (Holm)"]) == ("-", "-")


def test_missing_seeds_are_marked_and_named_and_their_pairs_are_left_out(place: Path):
    rows = [row for row in CLEAN if (row["algorithm"], row["seed"]) not in {("dvpo", 4), ("ppo", 1)}]
    (lines,) = lines_of(place, rows, noises={"clean": {}})
    dvpo, ppo, grpo = (lines[name, "ID"] for name in ("dvpo", "ppo", "grpo"))
    assert (dvpo["seeds"], ppo["seeds"], grpo["seeds"]) == ("3 of 4 !", "3 of 4 !", "4")
    # Seeds 2 and 3 are left: 20 and 10.
    assert dvpo["less ppo, paired [95%]"].startswith("+15.0 [")
    assert dvpo["less ppo, paired [95%]"].endswith("(2 of 4 pairs !)")
    assert grpo["less ppo, paired [95%]"].endswith("(3 of 4 pairs !)")
    study = load_study(write(place, algorithms=["dvpo", "ppo", "grpo"], seeds=[1, 2, 3, 4], noises={"clean": {}}))
    (note,) = [note for note in make_report(study, rows).notes if "have no row" in note]
    assert "2 of 12 cells have no row" in note
    assert "parity-clean-ppo-1, parity-clean-dvpo-4." in note


def test_the_pooled_table_takes_the_seed_as_its_unit_and_is_corrected_by_itself(place: Path):
    clean, flipped, pooled = lines_of(place, CLEAN + FLIP)
    dvpo, grpo = pooled["dvpo", "ID"], pooled["grpo", "ID"]
    # By seed, clean and flip: (10 + 0)/2, (20 - 10)/2, (10 + 10)/2, (20 + 10)/2 = 5 5 10 15: mean 8.75, p = 2/16.
    assert dvpo["less ppo, paired [95%]"].startswith("+8.8 [")
    # grpo: (0 + 10)/2, (10 + 10)/2, (-10 + 10)/2, (0 + 10)/2 = 5 10 0 5: the zero's sign does not matter: 4 of 16.
    # Holm over the pooled lines alone: 2 * .125 = .25, then max(.25, .25).
    assert (dvpo["p (Holm)"], grpo["p (Holm)"]) == ("0.250", "0.250")
    # Over the four lines of the two places: p = .125 (dvpo clean), 1 (grpo clean), .75 (dvpo flip: 0 -10 10 10, 6 of
    # 8 vectors of the three reach 10), .125 (grpo flip: 10 10 10 10): 4 * .125, 3 * .125 raised to .5, 2 * .75, 1.
    assert (clean["dvpo", "ID"]["p (Holm)"], flipped["grpo", "ID"]["p (Holm)"]) == ("0.500", "0.500")
    assert (clean["grpo", "ID"]["p (Holm)"], flipped["dvpo", "ID"]["p (Holm)"]) == ("1.000", "1.000")


def test_all_places_stand_side_by_side_with_the_highest_of_each_marked(place: Path):
    study = load_study(write(place, algorithms=["dvpo", "ppo", "grpo"], seeds=[1, 2, 3, 4]))
    critics = [dict(row, corr={"dvpo": 0.3, "ppo": 0.2}.get(row["algorithm"])) for row in CLEAN + FLIP[:-1]]
    ends, known = make_report(study, critics).sheets[-2:]
    assert ends.columns == ("algorithm", "parity, clean", "parity, flip", "highest")
    # Clean: (60 + 70)/2, (50 + 50)/2, (50 + 60)/2. Flip: (40 + 40)/2, (40 + 50)/2; grpo's last seed is missing, 140/3.
    assert ends.lines == (
        ("dvpo", "65.0*", "40.0", "1 of 2"),
        ("ppo", "50.0", "45.0", "0 of 2"),
        ("grpo", "55.0", "46.7* !", "1 of 2"),
    )
    assert known.lines == (("dvpo", "+0.30", "+0.30"), ("ppo", "+0.20", "+0.20"))  # grpo has no critic


def test_one_seed_has_no_interval(place: Path):
    study = load_study(write(place, algorithms=["dvpo", "ppo"], seeds=[1], noises={"clean": {}}))
    ((line, _),) = [sheet.lines for sheet in make_report(study, CLEAN).sheets]
    assert line[4:8] == ("60.0 [-]", "1.00 [-]", "+10.0 [-]", "1.000")
    assert any("10 rows of cells that are not chosen" in note for note in make_report(study, CLEAN).notes)


def test_the_checker_dial_is_named_and_markdown_holds_the_same_cells(place: Path):
    values = study_values()["config"] | {"model": {"checker": 0}}
    study = load_study(
        write(place, config=values, algorithms=["dvpo", "ppo"], seeds=[1, 2, 3, 4], noises={"clean": {}})
    )
    report = make_report(study, CLEAN)
    (sheet,) = report.sheets
    assert sheet.title == "parity, clean; checker dial 0"
    assert any(note.startswith("checker dial: how much") for note in report.notes)
    text = to_markdown(report)
    assert "**parity, clean; checker dial 0**" in text
    for line in sheet.lines:
        assert f"| {' | '.join(line)} |" in text
