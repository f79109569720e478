"""The results file of a study: no row is lost, mixed up or written by two."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dvpo.cli import main
from dvpo.errors import InputError
from dvpo.study import load_study
from dvpo.study_results import ResultsFile, last_quarter, read_results, result_row
from dvpo.study_run import _Progress
from study_files import a_row, workplace, write


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return workplace(tmp_path, monkeypatch)


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
        {"step": step, "eval/id/accuracy": at_id, "eval/ood/accuracy": at_ood, "eval/id/unknown": 3 if step else 5}
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
        "unknown": 3,
    }
    (unfinished, *_) = load_study(write(place), ["steps=11"]).cells
    with pytest.raises(InputError, match="lacks an evaluation at its start or end"):
        result_row(unfinished)


def test_the_line_of_a_finished_run_says_what_its_rewards_lost(place: Path):
    (cell, *_) = load_study(write(place)).cells
    cell.folder.mkdir(parents=True)
    faults = [*[{"kind": "timeout", "cured": False}] * 2, {"kind": "exception", "cured": True}, {"kind": "alarm"}]
    (cell.folder / "faults.jsonl").write_text("".join(json.dumps({"step": 1} | row) + "\n" for row in faults))
    out = io.StringIO()
    _Progress(Console(file=out, width=200), total=2, left=1).finished(cell, a_row(id_before=0.25, seconds=3, unknown=7))
    assert out.getvalue() == f"2/2  {cell.id}  ID 25.0 -> 50.0  7 held-out without a reward  2 rewards failed  3 s\n"


def test_the_last_quarter_is_averaged_split_by_split_and_the_start_is_no_part_of_it():
    curve = [[0, 0.1, 0.1], [4, 0.5, 0.5], [6, 0.6, None], [8, 0.9, 0.3]]
    averaged = last_quarter(a_row(curve=curve, id_true=0.9, ood_true=0.3))
    assert averaged["id_true"] == pytest.approx(0.75)  # of steps 6 and 8 of 8
    assert averaged["ood_true"] == 0.3
    assert last_quarter(a_row(curve=[[0, 0.1, None], [1, 0.4, None]]))["id_true"] == 0.4
    assert last_quarter(a_row(curve=[[0, 0.1, None], [1, 0.4, None]]))["ood_true"] is None
