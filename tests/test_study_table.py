"""The tables of a study are hand arithmetic, and say what is missing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dvpo.study import load_study
from dvpo.study_table import make_report, overviews, to_markdown
from study_files import a_row, study_values, workplace, write


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return workplace(tmp_path, monkeypatch)


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


def test_a_run_that_never_surpassed_its_start_has_its_peak_there_and_each_split_its_own(place: Path):
    curve = [[0, 0.4, 0.6], [1, 0.3, 0.1], [3, 0.2, 0.2]]
    row = a_row(
        noise="clean", algorithm="ppo", seed=1, id_before=0.4, ood_before=0.6, id_true=0.2, ood_true=0.2, curve=curve
    )
    (lines,) = lines_of(place, [row], noises={"clean": {}})
    assert [lines["ppo", split]["end less peak"] for split in ("ID", "OOD")] == ["-20.0", "-40.0"]


def test_missing_seeds_are_marked_and_named_and_their_pairs_are_left_out(place: Path):
    rows = [row for row in CLEAN if (row["algorithm"], row["seed"]) not in {("dvpo", 1), ("ppo", 4)}]
    (lines,) = lines_of(place, rows, noises={"clean": {}})
    dvpo, ppo, grpo = (lines[name, "ID"] for name in ("dvpo", "ppo", "grpo"))
    assert (dvpo["seeds"], ppo["seeds"], grpo["seeds"]) == ("3 of 4 !", "3 of 4 !", "4")
    # Seeds 2 and 3 are left: 20 and 10. By their places it would be 70 - 50 and 50 - 50.
    assert dvpo["less ppo, paired [95%]"].startswith("+15.0 [")
    assert dvpo["less ppo, paired [95%]"].endswith("(2 of 4 pairs !)")
    assert grpo["less ppo, paired [95%]"].endswith("(3 of 4 pairs !)")
    study = load_study(write(place, algorithms=["dvpo", "ppo", "grpo"], seeds=[1, 2, 3, 4], noises={"clean": {}}))
    (note,) = [note for note in make_report(study, rows).notes if "have no row" in note]
    assert "2 of 12 cells have no row" in note
    assert "parity-clean-dvpo-1, parity-clean-ppo-4." in note


def test_a_place_without_any_row_is_missing_from_the_pooled_table_and_not_left_out_of_it(place: Path):
    pooled = lines_of(place, CLEAN)[-1]["dvpo", "ID"]
    assert (pooled["seeds"], pooled["end, IQM [95%]"], pooled["less ppo, paired [95%]"]) == ("0 of 4 !", "-", "-")


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


def test_a_row_that_stands_alone_in_a_place_is_not_its_highest(place: Path):
    study = load_study(write(place, algorithms=["dvpo", "ppo"], seeds=[1, 2, 3, 4]))
    alone = [*scored("clean", "ppo", [50, 50, 40, 60]), *scored("flip", "ppo", [0, 0, 0, 0])]
    (ends,) = overviews(study, alone)
    assert ends.lines == (("dvpo", "-", "-", "-"), ("ppo", "50.0", "0.0", "-"))
    (ends,) = overviews(study, [*alone, *scored("clean", "dvpo", [60, 70, 50, 80])])
    assert ends.lines == (("dvpo", "65.0*", "-", "1 of 1"), ("ppo", "50.0", "0.0", "0 of 1"))


def test_the_tables_say_by_whom_accuracy_was_judged(place: Path):
    def said(**tasks: dict[str, str]) -> str:
        study = load_study(write(place, algorithms=["ppo"], seeds=[1], noises={"clean": {}}, tasks=tasks))
        rows = [a_row(task=task, algorithm="ppo", seed=1) for task in tasks]
        return make_report(study, rows).notes[0].partition(" on held-out prompts")[0]

    parity, own = {"name": "own:make_task"}, {"name": "files", "path": "prompts.jsonl"}
    by_reward = "by your reward (no truth was named)"
    assert said(parity=parity) == said(mine={**own, "truth": "own:truth"}) == "True greedy accuracy"
    assert said(mine=own) == f"Greedy accuracy {by_reward}"
    assert said(parity=parity, mine=own) == f"True greedy accuracy, that of mine {by_reward},"


def test_one_seed_has_no_interval(place: Path):
    study = load_study(write(place, algorithms=["dvpo", "ppo"], seeds=[1], noises={"clean": {}}))
    ((line, _),) = [sheet.lines for sheet in make_report(study, CLEAN).sheets]
    assert line[4:8] == ("60.0 [-]", "1.00 [-]", "+10.0 [-]", "1.000")
    assert any("10 rows of cells that are not chosen" in note for note in make_report(study, CLEAN).notes)
    assert not any("had no reward" in note for note in make_report(study, CLEAN).notes)
    shy = [row | {"unknown": 3} for row in CLEAN]
    assert any(note.startswith("6 held-out answers of 2 runs had no reward") for note in make_report(study, shy).notes)


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
